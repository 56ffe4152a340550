// The kernel's argument: AttentionParams boiled down to what the device needs.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "cuda/attention/sm90/tile_order.h"

namespace proxyattn::cuda::sm90 {

struct Problem {
  CUtensorMap q_map;    // [batch, q_heads, head_dim / 64, q_len, 64], boxes of a block's rows
  CUtensorMap k_map;    // [batch, kv_heads, head_dim / 64, kv_len, 64], boxes of kPartRows rows
  CUtensorMap v_map;    // the same of v
  CUtensorMap out_map;  // [batch, q_heads, head_dim / 64, q_len, 64], boxes of 64 rows by 64

  const int32_t* indices;  // [batch, list_heads, num_rows, list_capacity]; null: all visible
  const int32_t* counts;   // [batch, q_heads, num_rows]; null with indices
  void* out;               // for rows without blocks, which the copy engine does not write
  float* lse;              // [batch, q_heads, q_len]; null: not wanted
  int32_t* next_tile;      // counts the tiles that have been taken beyond the first of each team

  int64_t out_batch_stride;
  int64_t out_token_stride;
  int64_t out_head_stride;

  TileOrder tiles;
  int list_capacity;
  int q_len;
  int kv_len;
  int q_offset;
  int num_kv_blocks;
  int kv_block;
  int tiles_per_block;  // key tiles in a key block, if they are no smaller
  int causal;           // 0 or 1
  int rankings;         // 1: lists name the visible blocks, each once
  int num_teams;        // of the launch
  float scale_log2;     // scale * log2(e): softmax runs on powers of two
};

}  // namespace proxyattn::cuda::sm90
