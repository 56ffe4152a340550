#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "ops.h"

namespace proxyattn::binding {

TensorPair select_blocks(const at::Tensor& peak,
                         const std::optional<at::Tensor>& mass,
                         const at::Tensor& needs,
                         int64_t q_len,
                         int64_t kv_len,
                         int64_t num_heads,
                         int64_t block_size,
                         bool causal,
                         std::string_view budget_mode,
                         double gamma,
                         int64_t min_budget,
                         int64_t num_sink_blocks,
                         int64_t num_local_blocks,
                         std::optional<int64_t> window) {
  constexpr const char* kOp = "select_blocks";
  check_rank(kOp, "peak", peak, 4);
  check_dtype(kOp, "peak", peak, at::kFloat);

  SelectParams params{};
  params.batch = peak.size(0);
  params.q_len = q_len;
  params.kv_len = kv_len;
  params.q_heads = num_heads;
  params.proxy_heads = peak.size(1);
  params.q_block = block_size;
  params.kv_block = block_size;
  params.q_offset = kv_len - q_len;
  params.min_budget = min_budget;
  params.num_sink_blocks = num_sink_blocks;
  params.num_local_blocks = num_local_blocks;
  params.gamma = gamma;
  params.budget_mode = budget_mode_of(kOp, budget_mode);
  params.causal = causal;
  params.window = window_or_all(kOp, window);
  validate_select(params);
  validate_aligned_lengths(kOp, q_len, kv_len, causal);

  params.rows = params.list_rows = {0, ceil_div(q_len, block_size)};
  params.list_capacity = ceil_div(kv_len, block_size);
  const bool top_p = params.budget_mode == BudgetMode::kTopP;
  const auto shape = {params.batch, params.proxy_heads, params.rows.end, params.list_capacity};
  check_shape(kOp, "peak", peak, shape);
  check_input(kOp, "needs", needs, top_p ? at::kFloat : at::kInt, {params.batch, num_heads}, "peak",
              peak);
  TORCH_CHECK_VALUE(!top_p || mass.has_value(), kOp,
                    ": mass must be given with budget_mode 'top_p', got None");
  if (top_p) check_input(kOp, "mass", *mass, at::kFloat, shape, "peak", peak);
  const Backend& backend = backend_of(kOp, peak);
  const c10::DeviceGuard guard(peak.device());
  const Stream stream = backend.begin(peak);

  const auto int32 = peak.options().dtype(at::kInt);
  at::Tensor indices = at::empty(shape, int32);
  at::Tensor counts = at::empty({params.batch, num_heads, params.rows.end}, int32);
  const at::Tensor peak_rows = peak.contiguous();
  const at::Tensor mass_rows = top_p ? mass->contiguous() : at::Tensor();
  const at::Tensor head_needs = needs.contiguous();
  params.peak = peak_rows.const_data_ptr<float>();
  params.mass = top_p ? mass_rows.const_data_ptr<float>() : nullptr;
  params.budgets = top_p ? nullptr : head_needs.const_data_ptr<int32_t>();
  params.shares = top_p ? head_needs.const_data_ptr<float>() : nullptr;
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  backend.select_blocks(params, stream);
  return {indices, counts};
}

}  // namespace proxyattn::binding
