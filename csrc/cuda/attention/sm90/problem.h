// The kernel's argument: AttentionParams boiled down to what the device needs.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "common/sequence.h"
#include "common/visibility.h"
#include "cuda/attention/sm90/tile_order.h"

namespace proxyattn::cuda::sm90 {

// Pages of the key/value cache.
struct KeyPages {
  const int32_t* table;  // [sequences, table_pages]; null: keys follow one another
  int table_pages;
  int num_pages;
  int page_shift;      // log2 of a page's tokens
  int load_rows_log2;  // of the rows that one load takes of a page
};

struct Problem {
  // Packed queries are one batch entry, and so are packed keys; pages are entries of their own.
  CUtensorMap q_map;  // [batch, q_heads, head_dim / 64, q_len, 64], boxes of a block's rows
  CUtensorMap k_map;  // [batch, kv_heads, head_dim / 64, kv_len, 64], boxes of a part's rows, or
                      // of those that a page has of them by 64
  CUtensorMap v_map;  // the same of v
  CUtensorMap v_row_map;  // boxes of one row by 64; only with packed sequences
  CUtensorMap out_map;    // [batch, q_heads, head_dim / 64, q_len, 64], boxes of 64 rows by 64

  const int32_t* indices;    // [batch, list_heads, list_rows, list_capacity]; null: all visible
  const int32_t* counts;     // [batch, q_heads, list_rows]; null with indices
  const float* sink_logits;  // [q_heads]; null: none
  void* out;                 // for rows without blocks, which the copy engine does not write
  float* lse;                // [batch, q_heads, lse_pitch]; null: not wanted
  int32_t* next_tile;        // counts the tiles that have been taken beyond the first of each team

  int64_t out_batch_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;

  Visibility<int> visibility;
  TileOrder tiles;
  SequenceTable packed;  // of no sequences: a batch of equal ones, `sequence`
  Sequence sequence;
  KeyPages pages;
  int list_capacity;
  int list_rows;  // query blocks that lists and counts hold
  int lse_pitch;  // queries that lse holds of a head
  int kv_tokens;  // of a batch entry, or of all packed keys; behind them the copy engine has zeros
  int cached_keys;  // of a head, with their values, that fit the cache
  int kv_block;
  int tiles_per_block;  // key tiles in a key block, if they are no smaller; a power of two
  int rankings;         // 1: lists name the visible blocks, each once
  int num_teams;        // of the launch
  float scale_log2;     // scale * log2(e): softmax runs on powers of two
};

}  // namespace proxyattn::cuda::sm90
