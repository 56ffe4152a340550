// What the sm90 score kernels are told, and how their work is cut up.
//
// Of a row tile of sampled queries each chunk of sampled keys is computed that some row of it sees.
// A chunk is one stretch of keys or several: stretches begin at multiples of one length, and each
// has sums of its own, so that a row's bits depend on its query and the keys that it sees alone.
// How many make up a chunk is a matter of how much work there is to share out.
//
// A row tile's chunk leaves what it finds in a slot of scratch. Slots are numbered sequence by
// sequence, list by list, row tiles of a list from the last (the longest when causal) to the first,
// then chunk by chunk. A pass works on the row tiles whose first slot lies in its share of the
// slots; in which order, is for scheduler.cuh to say.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/common/macros.cuh"
#include "cuda/score/sm90/span.h"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

inline constexpr int64_t kBlockUnit = 64;  // tokens; divides every block size

struct ScoreProblem {
  CUtensorMap q_map;  // [batch, proxy_heads, head_dim / 64, sampled queries, 64], 64 rows
  KeyMaps keys;       // [batch, key proxies, sampled keys, head_dim]

  float* peak;             // [batch, proxy_heads, q_blocks, kv_blocks]
  float* mass;             // the same; null: not wanted
  float* block_max;        // [slots, key tiles of a chunk, row groups, values], see cells.cuh
  float* block_lse;        // the same; null with mass
  float* stretch_lse;      // [slots, stretches of a chunk, rows of a tile], base 2
  int32_t* next_item;      // items handed out beyond the first of each thread block
  const int32_t* budgets;  // [lists, heads_per_list]: see ScoreParams; null: all rows are scored

  // Packed sequences; without them all batch entries are alike.
  const Sequence* sequences;
  const ScoreSlots* slots;    // [num_sequences + 1]; the last one is behind all
  const int32_t* pass_tiles;  // first row tile of this pass and of the next
  ScoreSpan span;             // of a batch entry
  ScoreSlots entry_slots;     // of the first one
  int num_sequences;          // or batch entries
  int tiles_begin;            // row tiles of the pass, without packed sequences
  int tiles_end;

  int proxy_heads;
  int key_sharers;  // proxies that are scored with one key proxy
  int pass_begin;   // slots of the pass
  int pass_end;
  int chunk_shift;  // log2 of a chunk's key tiles
  int tile_rows;
  int stride_shift;
  int heads_per_list;
  int offset_units;    // position of query 0, rounded up to units of kBlockUnit tokens
  int kv_block_units;  // of a key block
  int q_block_shift;   // log2 of the units of a query block
  int first_q_block;   // of the call
  int num_q_blocks;    // of the output
  int num_kv_blocks;
  int block_rows;  // sampled queries of a whole query block
  int causal;      // 0 or 1
  float factor;    // scale * log2(e)

  PROXYATTN_HOST_DEVICE bool is_packed() const { return sequences != nullptr; }

  PROXYATTN_HOST_DEVICE ScoreSpan span_of(int sequence) const {
    if (!is_packed()) {
      ScoreSpan entry = span;
      entry.batch = sequence;
      return entry;
    }
    const Sequence& s = sequences[sequence];
    const int windows = (1 << stride_shift) - 1;
    return {0,
            s.first_q_block * block_rows,
            (s.q_len + windows) >> stride_shift,
            (s.offset >> stride_shift) + 1,
            (s.kv_len + windows) >> stride_shift,
            s.first_key_unit,
            s.first_q_block};
  }

  PROXYATTN_HOST_DEVICE ScoreSlots slots_of(int sequence) const {
    if (is_packed()) return slots[sequence];
    return {sequence * proxy_heads * entry_slots.list_slots,
            sequence * proxy_heads * entry_slots.list_tiles, entry_slots.list_slots,
            entry_slots.list_tiles};
  }

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

  // Sampled keys [0, visible) that a row of a span sees.
  PROXYATTN_HOST_DEVICE int visible_keys(const ScoreSpan& s, int row) const {
    if (!causal) return s.num_keys;
    return max_of(0, min_of(s.num_keys, s.first_limit + row));
  }
  // Key tiles that any row of a row tile sees.
  PROXYATTN_HOST_DEVICE int visible_tiles(const ScoreSpan& s, int row_tile) const {
    const int last_row = min_of((row_tile + 1) * tile_rows, s.num_rows) - 1;
    return ceil_div(visible_keys(s, last_row), kLogitKeys);
  }
  PROXYATTN_HOST_DEVICE int chunk_tiles() const { return 1 << chunk_shift; }
  PROXYATTN_HOST_DEVICE int chunk_stretches() const { return chunk_tiles() / kStretchTiles; }
  PROXYATTN_HOST_DEVICE int num_chunks(const ScoreSpan& s, int row_tile) const {
    return (visible_tiles(s, row_tile) + chunk_tiles() - 1) >> chunk_shift;
  }
};

}  // namespace proxyattn::cuda::sm90
