// Shared memory of a thread block: rings of query, key and value tiles, and what the producer says
// of them.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/traits.h"
#include "cuda/common/ring.cuh"

namespace proxyattn::cuda::sm90 {

// What the producer tells the consumers about a query tile.
struct __align__(16) TileInfo {
  int row;    // query block
  int head;   // query head
  int batch;  // batch entry
  int steps;  // key tiles to visit; 0: nothing to see, kNoMoreTiles: leave
};
inline constexpr int kNoMoreTiles = -1;

PROXYATTN_DEVICE TileInfo read_tile_info(const TileInfo& info) {
  return {read_beside(info.row), read_beside(info.head), read_beside(info.batch),
          read_beside(info.steps)};
}

template <typename Traits>
struct __align__(1024) SharedStorage {
  uint8_t query[Traits::kQueryStages][Traits::kQueryTileBytes];
  uint8_t key[Traits::kKeyStages][Traits::kKeyTileBytes];
  uint8_t value[Traits::kValueStages][Traits::kKeyTileBytes];
  RingBarriers<Traits::kQueryStages> query_barriers;
  RingBarriers<Traits::kKeyStages> key_barriers;
  RingBarriers<Traits::kValueStages> value_barriers;
  TileInfo tiles[Traits::kQueryStages];
  int key_tile[Traits::kKeyStages];  // which key tile a slot holds
};

}  // namespace proxyattn::cuda::sm90
