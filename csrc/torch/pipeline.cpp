#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "ops.h"
#include "settings.h"

namespace proxyattn::binding {

namespace {

// What both ops fill alike: everything but outputs, values and workspace.
PipelineParams dense_params(const char* op,
                            const at::Tensor& q,
                            const at::Tensor& k,
                            Settings& settings) {
  PipelineParams params{};
  params.batch = q.size(0);
  params.q_len = q.size(1);
  params.kv_len = k.size(1);
  params.q_heads = q.size(2);
  params.kv_heads = k.size(2);
  params.head_dim = q.size(3);
  params.q_offset = params.kv_len - params.q_len;
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.dtype = dtype_of(q);
  apply_settings(op, settings, q, params);
  validate_aligned_lengths(op, params.q_len, params.kv_len, params.causal);
  return params;
}

}  // namespace

TensorPair choose_blocks(const at::Tensor& q,
                         const at::Tensor& k,
                         bool causal,
                         std::optional<double> scale,
                         double gamma,
                         int64_t stride,
                         std::string_view pooling,
                         int64_t block_size,
                         int64_t num_proxy_heads,
                         std::string_view budget_mode,
                         int64_t min_budget,
                         int64_t num_sink_blocks,
                         int64_t num_local_blocks,
                         const std::optional<at::Tensor>& shares,
                         std::optional<int64_t> max_workspace_bytes,
                         std::optional<int64_t> window) {
  constexpr const char* kOp = "choose_blocks";
  check_qk(kOp, q, k, causal);
  Settings settings{causal,
                    scale,
                    gamma,
                    stride,
                    pooling,
                    block_size,
                    num_proxy_heads,
                    budget_mode,
                    min_budget,
                    num_sink_blocks,
                    num_local_blocks,
                    shares,
                    max_workspace_bytes,
                    window};
  PipelineParams params = dense_params(kOp, q, k, settings);
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  const auto int32 = q.options().dtype(at::kInt);
  params.list_rows = {0, ceil_div(params.q_len, block_size)};
  params.list_capacity = ceil_div(params.kv_len, block_size);
  at::Tensor indices =
      at::empty({params.batch, num_proxy_heads, params.list_rows.end, params.list_capacity}, int32);
  at::Tensor counts = at::empty({params.batch, params.q_heads, params.list_rows.end}, int32);
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  params.workspace_bytes = backend.choose_blocks_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.choose_blocks(params, stream);
  return {indices, counts};
}

TensorPair proxy_attention(const at::Tensor& q,
                           const at::Tensor& k,
                           const at::Tensor& v,
                           bool causal,
                           std::optional<double> scale,
                           double gamma,
                           int64_t stride,
                           std::string_view pooling,
                           int64_t block_size,
                           int64_t num_proxy_heads,
                           std::string_view budget_mode,
                           int64_t min_budget,
                           int64_t num_sink_blocks,
                           int64_t num_local_blocks,
                           const std::optional<at::Tensor>& shares,
                           bool return_lse,
                           std::optional<int64_t> max_workspace_bytes,
                           std::optional<int64_t> window,
                           const std::optional<at::Tensor>& sink_logits) {
  constexpr const char* kOp = "proxy_attention";
  check_qkv(kOp, q, k, v, causal);
  Settings settings{causal,
                    scale,
                    gamma,
                    stride,
                    pooling,
                    block_size,
                    num_proxy_heads,
                    budget_mode,
                    min_budget,
                    num_sink_blocks,
                    num_local_blocks,
                    shares,
                    max_workspace_bytes,
                    window};
  PipelineParams params = dense_params(kOp, q, k, settings);
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  at::Tensor out =
      at::empty({params.batch, params.q_len, params.q_heads, params.head_dim}, q.options());
  at::Tensor lse = return_lse ? at::empty({params.batch, params.q_heads, params.q_len},
                                          q.options().dtype(at::kFloat))
                              : unused_output(q);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);
  params.v = v.const_data_ptr();
  const at::Tensor sinks = sink_logits_of(kOp, sink_logits, params.q_heads, q);
  params.sink_logits = pointer_to(sinks);
  params.out = out.mutable_data_ptr();
  params.lse = return_lse ? lse.mutable_data_ptr<float>() : nullptr;
  params.lse_pitch = params.q_len;
  params.workspace_bytes = backend.proxy_attention_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.proxy_attention(params, stream);
  return {out, lse};
}

}  // namespace proxyattn::binding
