#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/validate.h"
#include "ops.h"

namespace proxyattn::binding {

namespace {

// What both ops fill alike: everything but the mode and its own arguments.
NeedParams need_params(const char* op,
                       const at::Tensor& q,
                       const at::Tensor& k,
                       int64_t block_size,
                       bool causal,
                       std::optional<double> scale,
                       std::optional<int64_t> window) {
  check_qk(op, q, k, causal);
  NeedParams params{};
  params.batch = q.size(0);
  params.q_len = q.size(1);
  params.kv_len = k.size(1);
  params.q_heads = q.size(2);
  params.kv_heads = k.size(2);
  params.head_dim = q.size(3);
  params.q_block = block_size;
  params.kv_block = block_size;
  params.q_offset = params.kv_len - params.q_len;
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.scale = scale_or_default(scale, params.head_dim);
  params.causal = causal;
  params.window = window_or_all(op, window);
  params.dtype = dtype_of(q);
  return params;
}

at::Tensor estimate(NeedParams& params, const at::Tensor& q) {
  validate_needs(params);
  validate_aligned_lengths(needs_op(params), params.q_len, params.kv_len, params.causal);
  const Backend& backend = backend_of(needs_op(params), q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);
  const bool budgets = params.mode == BudgetMode::kLastBlock;
  at::Tensor needs =
      at::empty({params.batch, params.q_heads}, q.options().dtype(budgets ? at::kInt : at::kFloat));
  if (budgets) {
    params.budgets = needs.mutable_data_ptr<int32_t>();
  } else {
    params.shares = needs.mutable_data_ptr<float>();
  }
  params.workspace_bytes = backend.estimate_needs_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.estimate_needs(params, stream);
  return needs;
}

}  // namespace

at::Tensor estimate_budgets(const at::Tensor& q,
                            const at::Tensor& k,
                            double gamma,
                            int64_t block_size,
                            bool causal,
                            std::optional<double> scale,
                            std::optional<int64_t> window) {
  NeedParams params = need_params("estimate_budgets", q, k, block_size, causal, scale, window);
  params.mode = BudgetMode::kLastBlock;
  params.gamma = gamma;
  return estimate(params, q);
}

at::Tensor estimate_shares(const at::Tensor& q,
                           const at::Tensor& k,
                           int64_t block_size,
                           bool causal,
                           std::optional<double> scale,
                           int64_t num_sink_blocks,
                           int64_t num_local_blocks,
                           std::optional<int64_t> window) {
  NeedParams params = need_params("estimate_shares", q, k, block_size, causal, scale, window);
  params.mode = BudgetMode::kTopP;
  params.num_sink_blocks = num_sink_blocks;
  params.num_local_blocks = num_local_blocks;
  return estimate(params, q);
}

}  // namespace proxyattn::binding
