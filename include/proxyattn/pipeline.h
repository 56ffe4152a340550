// proxy_attention: the five stages in one call, its scratch carved from one workspace.
#pragma once

#include <cstdint>

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
  int64_t min_budget;  // tokens
  int64_t num_sink_blocks;
  int64_t num_local_blocks;

  TokenStrides q_strides;
  TokenStrides k_strides;
  TokenStrides v_strides;
  TokenStrides out_strides;

  const void* q;    // [batch, q_len, q_heads, head_dim]
  const void* k;    // [batch, kv_len, kv_heads, head_dim]
  const void* v;    // [batch, kv_len, kv_heads, head_dim]
  void* out;        // [batch, q_len, q_heads, head_dim]
  float* lse;       // [batch, q_heads, q_len], natural log; null: not wanted
  void* workspace;  // proxy_attention_workspace_bytes(params) bytes; null when that is 0

  int64_t workspace_bytes;
  int64_t max_workspace_bytes;  // cap on workspace_bytes; INT64_MAX: none
  double gamma;
  float scale;
  BudgetMode budget_mode;
  bool causal;
  DType dtype;
};

namespace cpu {
int64_t proxy_attention_workspace_bytes(const PipelineParams& params);
void proxy_attention(const PipelineParams& params);
}  // namespace cpu
namespace cuda {
int64_t proxy_attention_workspace_bytes(const PipelineParams& params);
void proxy_attention(const PipelineParams& params, Stream stream);
}  // namespace cuda

}  // namespace proxyattn
