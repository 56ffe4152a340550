// What the sm90 kernel of estimate_needs is told.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "cuda/needs/sm90/items.h"
#include "cuda/sequences/page_table.h"
#include "cuda/sm90/key_loads.h"
#include "cuda/sm90/key_maps.h"

namespace proxyattn::cuda::sm90 {

struct NeedProblem {
  CUtensorMap q_map;  // [batch, q_heads, head_dim / 64, q_len, 64], 64 rows
  KeyMaps keys;       // [batch, kv_heads, kv_len, head_dim]

  float* block_lse;  // [heads, kv_blocks, q_block], see NeedLayout

  NeedItems items;
  PageTable pages;
  PageLoads page_loads;
  int64_t num_kv_blocks;  // of a head in block_lse
  int causal;             // 0 or 1
  float factor;           // scale * log2(e)
};

}  // namespace proxyattn::cuda::sm90
