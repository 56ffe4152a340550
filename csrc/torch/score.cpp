#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "ops.h"

namespace proxyattn::binding {

TensorPair score_blocks(const at::Tensor& q_proxy,
                        const at::Tensor& k_proxy,
                        int64_t q_len,
                        int64_t kv_len,
                        int64_t stride,
                        int64_t block_size,
                        bool causal,
                        std::optional<double> scale,
                        bool with_mass,
                        std::optional<int64_t> window) {
  constexpr const char* kOp = "score_blocks";
  check_heads_tensor(kOp, "q_proxy", q_proxy);
  check_heads_tensor(kOp, "k_proxy", k_proxy);
  check_same(kOp, "k_proxy", k_proxy, "q_proxy", q_proxy);

  ScoreParams params{};
  params.batch = q_proxy.size(0);
  params.q_len = q_len;
  params.kv_len = kv_len;
  params.proxy_heads = q_proxy.size(2);
  params.key_proxy_heads = k_proxy.size(2);
  params.head_dim = q_proxy.size(3);
  params.stride = stride;
  params.q_block = block_size;
  params.kv_block = block_size;
  params.q_offset = kv_len - q_len;
  params.scale = scale_or_default(scale, params.head_dim);
  params.causal = causal;
  params.window = window_or_all(kOp, window);
  params.dtype = dtype_of(q_proxy);
  validate_score(params);
  validate_aligned_lengths(kOp, q_len, kv_len, causal);
  check_shape(kOp, "q_proxy", q_proxy,
              {params.batch, ceil_div(q_len, stride), params.proxy_heads, params.head_dim});
  check_shape(kOp, "k_proxy", k_proxy,
              {params.batch, ceil_div(kv_len, stride), params.key_proxy_heads, params.head_dim});
  const Backend& backend = backend_of(kOp, q_proxy);
  const c10::DeviceGuard guard(q_proxy.device());
  const Stream stream = backend.begin(q_proxy);

  params.rows = {0, ceil_div(q_len, block_size)};
  const auto fp32 = q_proxy.options().dtype(at::kFloat);
  const auto shape = {params.batch, params.proxy_heads, params.rows.end,
                      ceil_div(kv_len, block_size)};
  at::Tensor peak = at::empty(shape, fp32);
  at::Tensor mass = with_mass ? at::empty(shape, fp32) : unused_output(q_proxy);
  params.q_proxy_strides = strides_of(q_proxy);
  params.k_proxy_strides = strides_of(k_proxy);
  params.q_proxy = q_proxy.const_data_ptr();
  params.k_proxy = k_proxy.const_data_ptr();
  params.peak = peak.mutable_data_ptr<float>();
  params.mass = with_mass ? mass.mutable_data_ptr<float>() : nullptr;
  params.workspace_bytes = backend.score_blocks_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q_proxy, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.score_blocks(params, stream);
  return {peak, mass};
}

}  // namespace proxyattn::binding
