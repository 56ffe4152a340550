// Shared memory of a team: rings of query, key and value tiles, and what scout and producers say of
// them.
#pragma once

#include <cstdint>

#include "common/visibility.h"
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
  RowKeys<int> keys;
};

PROXYATTN_DEVICE RowKeys<int> read_keys(const BlockRows& rows) {
  return {read_beside(rows.keys.first_begin), read_beside(rows.keys.first_end),
          read_beside(rows.keys.num_keys)};
}

// Where a key tile comes from: a part is kPartRows keys, numbered from the first of the sequence.
template <typename Traits>
using TileParts = int[Traits::kParts];
inline constexpr int kNoPart = (1 << 25) - 2;  // behind all keys, and its last key fits 32 bits

// A part with keys that a window hides from some rows. Consumers look twice at parts that are not
// before their first keys hidden from the other side; so a mark is a large number, and costs those
// without it nothing.
inline constexpr int kCutPart = 1 << 26;
PROXYATTN_DEVICE int mark_cut(int part) {
  return part | kCutPart;
}
PROXYATTN_DEVICE bool is_cut(int part) {
  return (part & kCutPart) != 0;
}
PROXYATTN_DEVICE int part_of(int part) {
  return part & ~kCutPart;
}

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
  KeyOwner owners[2];  // of the orders that the producers work on
  Sequence sequence;   // of the tile that the scout works on
  BlockRows block;     // likewise
  TileInfo tiles[Traits::kQueryStages][kTeamGroups];
  BlockRows rows[Traits::kQueryStages];
  TileParts<Traits> key_parts[Traits::kKeyStages];  // what a slot holds, with marks
};

}  // namespace proxyattn::cuda::sm90
