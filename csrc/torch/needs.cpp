#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/validate.h"
#include "ops.h"

namespace proxyattn::binding {

at::Tensor estimate_budgets(const at::Tensor& q,
                            const at::Tensor& k,
                            double gamma,
                            int64_t block_size,
                            bool causal,
                            std::optional<double> scale) {
  constexpr const char* kOp = "estimate_budgets";
  check_heads_tensor(kOp, "q", q);
  check_heads_tensor(kOp, "k", k);
  check_same(kOp, "k", k, "q", q);
  check_shape(kOp, "k", k, {q.size(0), k.size(1), k.size(2), q.size(3)});
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

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
  params.gamma = gamma;
  params.scale = scale_or_default(scale, params.head_dim);
  params.causal = causal;
  params.dtype = dtype_of(q);
  validate_needs(params);

  at::Tensor budgets = at::empty({params.batch, params.q_heads}, q.options().dtype(at::kInt));
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.budgets = budgets.mutable_data_ptr<int32_t>();
  params.workspace_bytes = backend.estimate_needs_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.estimate_needs(params, stream);
  return budgets;
}

}  // namespace proxyattn::binding
