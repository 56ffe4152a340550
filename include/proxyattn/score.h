// Stage 2, score_blocks: how much the proxy heads attend to each key block.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

namespace proxyattn {

struct ScoreParams {
  int64_t batch;
  int64_t q_len;   // tokens before sampling
  int64_t kv_len;  // tokens before sampling
  int64_t proxy_heads;
  int64_t key_proxy_heads;  // proxy c reads key proxy c * key_proxy_heads / proxy_heads
  int64_t head_dim;
  int64_t stride;
  int64_t q_block;
  int64_t kv_block;
  int64_t q_offset;  // position of query 0; kv_len - q_len unless the caller knows better
  int64_t window;    // tokens that a query sees, its own the last; 0: all up to its own
  BlockRange rows;   // query blocks to score

  TokenStrides q_proxy_strides;
  TokenStrides k_proxy_strides;

  const void* q_proxy;  // [batch, ceil(q_len / stride), proxy_heads, head_dim]
  const void* k_proxy;  // [batch, ceil(kv_len / stride), key_proxy_heads, head_dim]
  float* peak;          // [batch, proxy_heads, rows, ceil(kv_len / kv_block)], contiguous
  float* mass;          // same shape; null: not wanted
  void* workspace;      // score_blocks_workspace_bytes(params) bytes; null when that is 0

  int64_t workspace_bytes;
  float scale;
  bool causal;
  DType dtype;

  // Key blocks that each query head reads in rows that see so many: [batch, q_heads]. Rows of a
  // list all whose heads read everything need no scores and may be left without. Null: score all.
  const int32_t* budgets = nullptr;
  int64_t q_heads = 0;

  PackedSequences packed;  // without q_starts: a batch
};

namespace cpu {
int64_t score_blocks_workspace_bytes(const ScoreParams& params);
void score_blocks(const ScoreParams& params);
}  // namespace cpu
namespace cuda {
int64_t score_blocks_workspace_bytes(const ScoreParams& params);
void score_blocks(const ScoreParams& params, Stream stream);
}  // namespace cuda

}  // namespace proxyattn
