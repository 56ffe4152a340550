// Shared memory of a team: rings of query, key and value tiles, and what scout and producer say of
// them.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/key_order.cuh"
#include "cuda/attention/sm90/pairs.cuh"
#include "cuda/attention/sm90/traits.h"
#include "cuda/common/ring.cuh"

namespace proxyattn::cuda::sm90 {

// What the scout tells a consumer warpgroup about its rows of a query tile.
struct TileInfo {
  int token;  // first one of the query block, in q, out and lse
  int head;   // query head; kNoHead: the rows are nobody's
  int batch;  // batch entry
  int steps;  // key tiles to visit; 0: nothing to see, kNoMoreTiles: leave
  int odd;    // 1 if the last key tile's second part is not the head's
  int skip;   // key tiles behind those that only the other head visits
};
inline constexpr int kNoMoreTiles = -1;

template <typename Traits>
PROXYATTN_DEVICE TileInfo read_tile_info(const TileInfo& info) {
  return {read_beside(info.token),
          read_beside(info.head),
          read_beside(info.batch),
          read_beside(info.steps),
          Traits::kParts > 1 ? read_beside(info.odd) : 0,
          Traits::kHeads > 1 ? read_beside(info.skip) : 0};
}

// Which rows of a query tile exist and what they see. Read when it is wanted, in tiles that are
// masked and at the end, so that it takes no registers in between.
struct BlockRows {
  int count;
  int first_limit;  // causal: position of row 0, plus one; otherwise kv_len
  int kv_len;

  // Row r sees keys [0, limit(r)).
  PROXYATTN_DEVICE int limit(int row) const { return min(kv_len, first_limit + row); }
};

PROXYATTN_DEVICE BlockRows read_rows(const BlockRows& rows) {
  return {read_beside(rows.count), read_beside(rows.first_limit), read_beside(rows.kv_len)};
}

// Where a key tile comes from: a part is kPartRows keys, numbered from the first of the sequence.
template <typename Traits>
using TileParts = int[Traits::kParts];
inline constexpr int kNoPart = (1 << 25) - 2;  // behind all keys, and its last key fits 32 bits

template <typename Traits>
struct __align__(1024) SharedStorage {
  uint8_t query[Traits::kQueryStages][Traits::kQueryTileBytes];
  uint8_t key[Traits::kKeyStages][Traits::kKeyTileBytes];
  uint8_t value[Traits::kValueStages][Traits::kKeyTileBytes];
  RingBarriers<Traits::kQueryStages> query_barriers;
  RingBarriers<Traits::kKeyStages> key_barriers;
  RingBarriers<Traits::kValueStages> value_barriers;
  RingBarriers<1> order_barriers;
  KeyOrder order;
  KeyOwner owner;     // of the order that the producer works on
  Sequence sequence;  // of the tile that the scout works on
  TileInfo tiles[Traits::kQueryStages][kTeamGroups];
  BlockRows rows[Traits::kQueryStages];
  TileParts<Traits> key_parts[Traits::kKeyStages];  // what a slot holds
};

}  // namespace proxyattn::cuda::sm90
