// What the sm90 score kernels are told, and how their work is cut up.
//
// A pass works on a range of row tiles of a range of lists. Of a row tile of sampled queries it
// computes each chunk of sampled keys that some row of it sees. A chunk is one stretch of keys or
// several: stretches begin at multiples of one length, and each has sums of its own, so that a
// row's bits depend on its query and the keys that it sees alone. How many make up a chunk is a
// matter of how much work there is to share out.
//
// A row tile's chunk leaves what it finds in a slot of scratch. Slots are numbered list by list,
// row tiles of a list from the last (the longest when causal) to the first, then chunk by chunk; in
// which order they are computed is for scheduler.cuh to say.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "common/math.h"
#include "cuda/common/macros.cuh"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

inline constexpr int64_t kBlockUnit = 64;  // tokens; divides every block size

struct ScoreProblem {
  CUtensorMap q_map;  // [batch, proxy_heads, head_dim / 64, sampled queries, 64], 64 rows
  KeyMaps keys;       // [batch, key proxies, sampled keys, head_dim]

  float* peak;             // [lists, q_blocks, kv_blocks]
  float* mass;             // the same; null: not wanted
  float* block_max;        // [slots, key tiles of a chunk, row groups, values], see cells.cuh
  float* block_lse;        // the same; null with mass
  float* stretch_lse;      // [slots, stretches of a chunk, rows of a tile], base 2
  int32_t* next_item;      // items handed out beyond the first of each thread block
  const int32_t* budgets;  // [lists, heads_per_list]: see ScoreParams; null: all rows are scored

  int proxy_heads;
  int key_sharers;  // proxies that are scored with one key proxy
  int first_list;   // of the pass
  int num_lists;
  int first_row_tile;  // of the pass
  int num_row_tiles;   // of the pass, in each list
  int num_list_slots;  // of the pass, in each list
  int chunk_shift;     // log2 of a chunk's key tiles
  int first_row;       // sampled query that the output begins with
  int num_rows;        // sampled queries of the call
  int tile_rows;
  int num_keys;
  int first_limit;  // causal: sampled keys that sampled query 0 sees, maybe negative
  int heads_per_list;
  int offset_units;    // position of query 0, rounded up to units of kBlockUnit tokens
  int kv_block_units;  // of a key block
  int q_block_shift;   // log2 of the units of a query block
  int first_q_block;   // of the call
  int num_q_blocks;
  int num_kv_blocks;
  int block_rows;  // sampled queries of a whole query block
  int causal;      // 0 or 1
  float factor;    // scale * log2(e)

  // The first query block of the call that wants scores of a list: those before it see no more key
  // blocks than each head of the list reads.
  PROXYATTN_DEVICE int first_scored_block(int list) const {
    if (budgets == nullptr) return 0;
    const int32_t* mine = budgets + static_cast<int64_t>(list) * heads_per_list;
    int least = num_kv_blocks;
    PROXYATTN_NO_UNROLL
    for (int i = 0; i < heads_per_list; ++i) least = min_of(least, mine[i]);
    if (least >= num_kv_blocks) return num_q_blocks;
    if (!causal) return 0;
    // Query blocks [0, m) end before the keys of `least` blocks do.
    const int m = (least * kv_block_units - offset_units) >> q_block_shift;
    return max_of(0, min_of(m - first_q_block, num_q_blocks));
  }

  // Sampled keys [0, visible) that a row of the call sees.
  PROXYATTN_HOST_DEVICE int visible_keys(int row) const {
    if (!causal) return num_keys;
    return max_of(0, min_of(num_keys, first_limit + first_row + row));
  }
  // Key tiles that any row of a row tile sees.
  PROXYATTN_HOST_DEVICE int visible_tiles(int row_tile) const {
    const int last_row = min_of((row_tile + 1) * tile_rows, num_rows) - 1;
    return ceil_div(visible_keys(last_row), kLogitKeys);
  }
  PROXYATTN_HOST_DEVICE int chunk_tiles() const { return 1 << chunk_shift; }
  PROXYATTN_HOST_DEVICE int num_chunks(int row_tile) const {
    return (visible_tiles(row_tile) + chunk_tiles() - 1) >> chunk_shift;
  }
  PROXYATTN_HOST_DEVICE int chunk_stretches() const { return chunk_tiles() / kStretchTiles; }
};

}  // namespace proxyattn::cuda::sm90
