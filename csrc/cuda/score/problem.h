// What the score kernels are told: the sampled problem in units of sampled tokens.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"

namespace proxyattn::cuda {

// Sampled queries of one row tile of the kernels.
inline constexpr int kScoreTileRows = 128;

struct ScoreProblem {
  const void* q;  // sampled query 0 of the sequence
  const void* k;
  float* lse;  // [lists, first-pass chunks, rows], base 2, over a row's visible keys in the chunk;
               // the combined sums end in chunk 0
  float* peak;
  float* mass;  // null: not wanted
  TokenStrides q_strides;
  TokenStrides k_strides;
  int64_t lists;  // batch * proxy_heads
  int64_t proxy_heads;
  int64_t key_sharers;  // proxies that are scored with one key proxy
  int64_t q_offset;     // position of query 0
  int64_t first_row;    // sampled query that the output begins with
  int64_t num_rows;     // sampled queries
  int64_t lse_pitch;    // of one list
  int64_t num_row_tiles;
  int64_t num_q_blocks;  // of the output
  int64_t num_kv_blocks;
  int stride;
  int block_rows;  // sampled queries of a whole query block
  int block_keys;  // sampled keys of a whole key block
  int num_keys;    // sampled keys
  int chunk_keys;  // keys that one thread block works on, a multiple of block_keys
  int num_chunks;
  float factor;  // scale * log2(e)
  bool causal;
  bool q_aligned;
  bool k_aligned;

  // Sampled keys [0, visible) that a row of this call sees.
  PROXYATTN_HOST_DEVICE int visible_keys(int64_t row) const {
    if (row >= num_rows) return 0;
    if (!causal) return num_keys;
    const int64_t position = q_offset + (first_row + row) * stride;
    if (position < 0) return 0;
    return static_cast<int>(min_of<int64_t>(position / stride + 1, num_keys));
  }
};

// The part of a problem that one thread block works on.
struct ScoreItem {
  int64_t list;
  int64_t first_row;  // of the tile, counted from the first row of the call
  int chunk;

  // Tiles of the latest rows first: with causal masking they have the most to do. Neighbours share
  // a chunk of keys, so that it is read from memory once.
  PROXYATTN_HOST_DEVICE ScoreItem(const ScoreProblem& p, int64_t idx)
      : list(idx / p.num_row_tiles / p.num_chunks),
        first_row((p.num_row_tiles - 1 - idx % p.num_row_tiles) * kScoreTileRows),
        chunk(static_cast<int>(idx / p.num_row_tiles % p.num_chunks)) {}

  PROXYATTN_HOST_DEVICE int first_key(const ScoreProblem& p) const { return chunk * p.chunk_keys; }

  // End of the keys of the chunk that any row of the tile sees; at most first_key if none does.
  PROXYATTN_HOST_DEVICE int end_key(const ScoreProblem& p) const {
    const int64_t last_row = min_of(first_row + kScoreTileRows, p.num_rows) - 1;
    return min_of(p.visible_keys(last_row), first_key(p) + p.chunk_keys);
  }

  // Keys that every row of the tile sees. Rows past the end see none.
  PROXYATTN_HOST_DEVICE int unmasked_keys(const ScoreProblem& p) const {
    return first_row + kScoreTileRows > p.num_rows ? 0 : p.visible_keys(first_row);
  }
};

}  // namespace proxyattn::cuda
