// Which query tile a number stands for.
//
// Tiles are handed out through one counter. Key/value heads are taken in sections whose keys and
// values fit the L2 cache together; in a section come the query blocks from the last (the longest
// when causal) down, so that the tiles that teams end with are short; of a query block the
// key/value heads, and of one of those the query heads that share it, side by side.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"

#include "common/math.h"
#include "common/sharing.h"
#include "cuda/attention/schedule.h"
#include "cuda/attention/sm90/config.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda::sm90 {

// Packed sequences are one batch entry: what differs from one to the next the device knows.
inline int64_t batch_entries(const AttentionParams& a) {
  return is_packed(a) ? 1 : a.batch;
}

struct TileOrder {
  int num_tiles;  // of packed sequences at most so many
  int num_rows;   // query blocks of this call
  int row_begin;  // the first of them
  int q_heads;
  int kv_heads;
  int heads_per_kv;
  int pair_group;        // heads of a kv head that share a list; 1 if teams work on one head
  int group_pairs;       // query tiles of such a group
  int tiles_per_kv_row;  // query tiles of a kv head and query block
  int num_kv;            // kv heads of all batch entries; of each packed sequence
  int section_kv;        // of them, that the cache holds together
  int list_heads;
  int heads_per_list;
};

// Heads that share keys and list, as far as find_pair can tell them apart.
inline int64_t pair_group(const AttentionParams& a) {
  const int64_t sharing = heads_sharing_list(a);
  int64_t heads = min_of<int64_t>(sharing, kMaxPairGroup);
  while (sharing % heads != 0) --heads;
  return heads;
}

// `tile_heads` are the heads of a query tile, `section_bytes` what the cache holds of keys and
// values.
inline TileOrder make_tile_order(const AttentionParams& a, int tile_heads, int64_t section_bytes) {
  TileOrder t{};
  t.num_rows = static_cast<int>(a.rows.end - a.rows.begin);
  t.row_begin = static_cast<int>(a.rows.begin);
  t.q_heads = static_cast<int>(a.q_heads);
  t.kv_heads = static_cast<int>(a.kv_heads);
  t.heads_per_kv = static_cast<int>(a.q_heads / a.kv_heads);
  t.pair_group = tile_heads == 1 ? 1 : static_cast<int>(pair_group(a));
  t.group_pairs = ceil_div(t.pair_group, tile_heads);
  t.tiles_per_kv_row = t.heads_per_kv / t.pair_group * t.group_pairs;
  t.num_kv = static_cast<int>(batch_entries(a)) * t.kv_heads;
  t.section_kv = static_cast<int>(kv_pairs_in_section(a, section_bytes));
  t.num_tiles = t.num_kv * t.tiles_per_kv_row * t.num_rows;
  t.list_heads = static_cast<int>(a.list_heads);
  t.heads_per_list = static_cast<int>(a.q_heads / a.list_heads);
  return t;
}

struct TilePlace {
  int row;  // query block, counted from the first of the sequence
  int batch;
  int kv_head;
  int head;  // query head, or the first of the group that the pair is of
  int pair;

  PROXYATTN_HOST_DEVICE TilePlace(const TileOrder& t, int tile) {
    const int tiles_per_kv = t.num_rows * t.tiles_per_kv_row;
    const int first_kv = tile / (t.section_kv * tiles_per_kv) * t.section_kv;
    const int in_section = tile - first_kv * tiles_per_kv;
    const int tiles_per_row = min_of(t.section_kv, t.num_kv - first_kv) * t.tiles_per_kv_row;
    const int in_row = in_section % tiles_per_row;
    row = t.row_begin + t.num_rows - 1 - in_section / tiles_per_row;
    const int kv = first_kv + in_row / t.tiles_per_kv_row;
    const int place = in_row % t.tiles_per_kv_row;
    batch = kv / t.kv_heads;
    kv_head = kv - batch * t.kv_heads;
    pair = place % t.group_pairs;
    head = kv_head * t.heads_per_kv + place / t.group_pairs * t.pair_group;
  }

  // Of all heads of all batch entries, and of all their lists.
  PROXYATTN_HOST_DEVICE int64_t head_idx(const TileOrder& t) const {
    return static_cast<int64_t>(batch) * t.q_heads + head;
  }
  PROXYATTN_HOST_DEVICE int64_t list_idx(const TileOrder& t) const {
    return static_cast<int64_t>(batch) * t.list_heads + head / t.heads_per_list;
  }
};

}  // namespace proxyattn::cuda::sm90
