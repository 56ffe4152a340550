#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "ops.h"

namespace proxyattn::binding {

TensorPair select_blocks(const at::Tensor& peak,
                         const at::Tensor& mass,
                         const at::Tensor& budgets,
                         int64_t q_len,
                         int64_t kv_len,
                         int64_t block_size,
                         bool causal,
                         std::string_view budget_mode,
                         int64_t min_budget,
                         int64_t num_sink_blocks,
                         int64_t num_local_blocks) {
  constexpr const char* kOp = "select_blocks";
  check_rank(kOp, "peak", peak, 4);
  check_dtype(kOp, "peak", peak, at::kFloat);
  check_rank(kOp, "budgets", budgets, 2);
  check_dtype(kOp, "budgets", budgets, at::kInt);
  check_device(kOp, "budgets", budgets, "peak", peak);

  SelectParams params{};
  params.batch = peak.size(0);
  params.q_len = q_len;
  params.kv_len = kv_len;
  params.q_heads = budgets.size(1);
  params.proxy_heads = peak.size(1);
  params.q_block = block_size;
  params.kv_block = block_size;
  params.q_offset = kv_len - q_len;
  params.min_budget = min_budget;
  params.num_sink_blocks = num_sink_blocks;
  params.num_local_blocks = num_local_blocks;
  params.budget_mode = budget_mode_of(kOp, budget_mode);
  params.causal = causal;
  validate_select(params);

  params.rows = {0, ceil_div(q_len, block_size)};
  const auto shape = {params.batch, params.proxy_heads, params.rows.end,
                      ceil_div(kv_len, block_size)};
  check_shape(kOp, "peak", peak, shape);
  check_shape(kOp, "budgets", budgets, {params.batch, params.q_heads});
  const bool coverage = params.budget_mode == BudgetMode::kTopP;
  if (coverage) {
    check_dtype(kOp, "mass", mass, at::kFloat);
    check_device(kOp, "mass", mass, "peak", peak);
    check_shape(kOp, "mass", mass, shape);
  }
  const Backend& backend = backend_of(kOp, peak);
  const c10::DeviceGuard guard(peak.device());
  const Stream stream = backend.begin(peak);

  const auto int32 = peak.options().dtype(at::kInt);
  at::Tensor indices = at::empty(shape, int32);
  at::Tensor counts = at::empty({params.batch, params.q_heads, params.rows.end}, int32);
  const at::Tensor peak_rows = peak.contiguous();
  const at::Tensor mass_rows = coverage ? mass.contiguous() : mass;
  const at::Tensor head_budgets = budgets.contiguous();
  const at::Tensor shares =
      at::empty({coverage ? params.batch : 0, params.q_heads}, peak.options().dtype(at::kDouble));
  params.peak = peak_rows.const_data_ptr<float>();
  params.mass = coverage ? mass_rows.const_data_ptr<float>() : nullptr;
  params.budgets = head_budgets.const_data_ptr<int32_t>();
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  params.shares = coverage ? shares.mutable_data_ptr<double>() : nullptr;
  backend.select_blocks(params, stream);
  return {indices, counts};
}

}  // namespace proxyattn::binding
