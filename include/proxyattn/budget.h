// Stage 3, estimate_budgets: how many key blocks each head needs, from its last queries.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

namespace proxyattn {

struct BudgetParams {
  int64_t batch;
  int64_t q_len;
  int64_t kv_len;
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t q_block;  // the last min(q_block, q_len) queries are looked at
  int64_t kv_block;
  int64_t q_offset;  // position of query 0

  TokenStrides q_strides;
  TokenStrides k_strides;

  const void* q;     // [batch, q_len, q_heads, head_dim]
  const void* k;     // [batch, kv_len, kv_heads, head_dim]
  int32_t* budgets;  // [batch, q_heads]
  void* workspace;   // estimate_budgets_workspace_bytes(params) bytes; null when that is 0

  int64_t workspace_bytes;
  double gamma;  // share of the attention mass that the budget must reach
  float scale;
  bool causal;
  DType dtype;
};

namespace cpu {
int64_t estimate_budgets_workspace_bytes(const BudgetParams& params);
void estimate_budgets(const BudgetParams& params);
}  // namespace cpu
namespace cuda {
int64_t estimate_budgets_workspace_bytes(const BudgetParams& params);
void estimate_budgets(const BudgetParams& params, Stream stream);
}  // namespace cuda

}  // namespace proxyattn
