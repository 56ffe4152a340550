// proxy_attention: the five stages in one call, its scratch carved from one workspace.
// choose_blocks is the same but for the last stage.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

namespace proxyattn {

struct PipelineParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t proxy_heads;
  int64_t head_dim;
  int64_t stride;
  int64_t q_block;
  int64_t kv_block;
  int64_t q_offset;    // position of query 0
  int64_t window;      // keys that a query sees, its own the last; 0: all up to its own
  int64_t min_budget;  // tokens
  int64_t num_sink_blocks;
  int64_t num_local_blocks;

  TokenStrides q_strides;
  TokenStrides k_strides;
  TokenStrides v_strides;
  TokenStrides out_strides;

  const void* q;        // [batch, q_len, q_heads, head_dim]
  const void* k;        // [batch, kv_len, kv_heads, head_dim]
  const float* shares;  // [batch, q_heads], what estimate_shares gives; null: estimated if needed
  void* workspace;      // <op>_workspace_bytes(params) bytes; null when that is 0

  // proxy_attention
  const void* v;             // [batch, kv_len, kv_heads, head_dim]
  const float* sink_logits;  // [q_heads], of a column without a value in each row; null: none
  void* out;                 // [batch, q_len, q_heads, head_dim]
  float* lse;                // [batch, q_heads, lse_pitch], natural log; null: not wanted
  int64_t lse_pitch;         // queries that lse holds of a head: q_len, or all packed ones

  // choose_blocks
  int32_t* indices;       // [batch, proxy_heads, list_rows, list_capacity], -1 past visible
  int32_t* counts;        // [batch, q_heads, list_rows]
  BlockRange list_rows;   // query blocks that these hold: all, of packed sequences all of theirs
  int64_t list_capacity;  // entries that a list has room for, at least all key blocks

  int64_t workspace_bytes;
  int64_t max_workspace_bytes;  // cap on workspace_bytes; INT64_MAX: none
  double gamma;
  float scale;
  Pooling pooling;
  BudgetMode budget_mode;
  bool causal;
  DType dtype;

  PackedSequences packed;  // without q_starts: a batch
};

namespace cpu {
int64_t proxy_attention_workspace_bytes(const PipelineParams& params);
void proxy_attention(const PipelineParams& params);
int64_t choose_blocks_workspace_bytes(const PipelineParams& params);
void choose_blocks(const PipelineParams& params);
}  // namespace cpu
namespace cuda {
int64_t proxy_attention_workspace_bytes(const PipelineParams& params);
void proxy_attention(const PipelineParams& params, Stream stream);
int64_t choose_blocks_workspace_bytes(const PipelineParams& params);
void choose_blocks(const PipelineParams& params, Stream stream);
}  // namespace cuda

}  // namespace proxyattn
