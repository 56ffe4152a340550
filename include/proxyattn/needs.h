// Stage 3, what each head needs, from its attention in the last queries: estimate_budgets counts
// key blocks, estimate_shares says how much the forced blocks hold.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

namespace proxyattn {

struct NeedParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t q_block;  // the last min(q_block, q_len) queries are looked at
  int64_t kv_block;
  int64_t q_offset;          // position of query 0
  int64_t window;            // keys that a query sees, its own the last; 0: all up to its own
  int64_t num_sink_blocks;   // shares: what is forced, as in SelectParams
  int64_t num_local_blocks;  // shares

  TokenStrides q_strides;
  TokenStrides k_strides;

  const void* q;     // [batch, q_len, q_heads, head_dim]
  const void* k;     // [batch, kv_len, kv_heads, head_dim]
  int32_t* budgets;  // [batch, q_heads]; written with kLastBlock
  float* shares;     // [batch, q_heads]; written with kTopP
  void* workspace;   // estimate_needs_workspace_bytes(params) bytes; null when that is 0

  int64_t workspace_bytes;
  double gamma;  // budgets: share of the attention mass that they must reach
  float scale;
  BudgetMode mode;  // which of the two is estimated
  bool causal;
  DType dtype;

  PackedSequences packed;  // without q_starts: a batch
};

namespace cpu {
int64_t estimate_needs_workspace_bytes(const NeedParams& params);
void estimate_needs(const NeedParams& params);
}  // namespace cpu
namespace cuda {
int64_t estimate_needs_workspace_bytes(const NeedParams& params);
void estimate_needs(const NeedParams& params, Stream stream);
}  // namespace cuda

}  // namespace proxyattn
