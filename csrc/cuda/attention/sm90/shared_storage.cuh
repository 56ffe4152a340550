// Shared memory of a thread block, and the rings that walk it.
//
// Every ring slot has two barriers. `full`: the producer announces the bytes, the copy engine
// completes the phase. `empty`: each consumer warpgroup arrives once when it has read the slot.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/traits.h"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace proxyattn::cuda::sm90 {

inline constexpr int kConsumerGroups = 2;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// What the producer tells the consumers about a query tile.
struct __align__(16) TileInfo {
  int row;    // query block
  int head;   // query head
  int batch;  // batch entry
  int steps;  // key tiles to visit; 0: nothing to see, kNoMoreTiles: leave
};
inline constexpr int kNoMoreTiles = -1;

template <int Stages>
struct RingBarriers {
  uint64_t full[Stages];
  uint64_t empty[Stages];

  __device__ void init() {
    for (int i = 0; i < Stages; ++i) {
      ptx::mbarrier_init(&full[i], 1);
      ptx::mbarrier_init(&empty[i], kConsumerGroups);
    }
  }
};

// Position in a ring. Phases flip when the slot wraps; a producer starts one phase ahead so that
// its first pass over the empty barriers doesn't wait.
template <int Stages>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;

  PROXYATTN_DEVICE void next() {
    if (++slot == Stages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

template <typename Traits>
struct __align__(1024) SharedStorage {
  uint8_t query[Traits::kQueryStages][Traits::kQueryTileBytes];
  uint8_t key[Traits::kKeyStages][Traits::kKeyTileBytes];
  uint8_t value[Traits::kValueStages][Traits::kKeyTileBytes];
  RingBarriers<Traits::kQueryStages> query_barriers;
  RingBarriers<Traits::kKeyStages> key_barriers;
  RingBarriers<Traits::kValueStages> value_barriers;
  TileInfo tiles[Traits::kQueryStages];
  // Which key tile a slot holds, by phase and slot. One copy for each phase: when a slot is loaded
  // again, a slow warp may still be about to read what the slot held before.
  int key_tile[2][Traits::kKeyStages];
};

}  // namespace proxyattn::cuda::sm90
