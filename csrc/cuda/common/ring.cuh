// Rings of shared-memory slots between one producer and a few consumer warpgroups.
//
// Every slot has two barriers. `full`: the producer announces the bytes, the copy engine completes
// the phase. `empty`: each consumer warpgroup arrives once when it has read the slot.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace proxyattn::cuda {

inline constexpr int kConsumerGroups = 2;
inline constexpr unsigned kFullWarp = 0xffffffffu;

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

}  // namespace proxyattn::cuda
