// The packed forms: sequences of different lengths in one call, their keys perhaps in pages.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "device_checks.h"
#include "ops.h"
#include "packed.h"
#include "settings.h"

namespace proxyattn::binding {

TensorPair block_sparse_attention_varlen(const at::Tensor& q,
                                         const at::Tensor& k,
                                         const at::Tensor& v,
                                         const at::Tensor& cu_seqlens_q,
                                         const std::optional<at::Tensor>& cu_seqlens_k,
                                         int64_t max_seqlen_q,
                                         int64_t max_seqlen_k,
                                         const at::Tensor& indices,
                                         const at::Tensor& counts,
                                         const std::optional<at::Tensor>& block_table,
                                         const std::optional<at::Tensor>& seqused_k,
                                         int64_t block_size,
                                         bool causal,
                                         std::optional<double> scale,
                                         bool return_lse,
                                         const std::optional<at::Tensor>& out,
                                         std::optional<int64_t> window,
                                         const std::optional<at::Tensor>& sink_logits) {
  constexpr const char* kOp = "block_sparse_attention_varlen";
  const PackedInputs inputs(kOp, q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k);
  inputs.check_values(v);
  check_rank(kOp, "indices", indices, 3);
  AttentionParams params{};
  inputs.fill(max_seqlen_q, max_seqlen_k, params);
  params.list_heads = indices.size(0);
  params.list_capacity = indices.size(2);
  params.q_block = block_size;
  params.kv_block = block_size;
  params.scale = scale_or_default(scale, params.head_dim);
  params.causal = causal;
  params.window = window_or_all(kOp, window);
  validate_attention(params, kOp);

  const int64_t num_rows = max_packed_blocks(params.packed, params.batch, block_size);
  check_input(kOp, "indices", indices, at::kInt,
              {params.list_heads, num_rows, params.list_capacity}, "q", q);
  check_input(kOp, "counts", counts, at::kInt, {params.q_heads, num_rows}, "q", q);
  if (wants_checks()) {
    const SequenceLengths lengths = check_lengths(
        kOp, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k);
    check_rows_of_lists(kOp, indices, counts, lengths.num_blocks(block_size));
  }
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  PackedOutputs outputs(kOp, q, k, v, out, return_lse);
  outputs.fill(params);
  const at::Tensor lists = addressable(indices);
  const at::Tensor list_counts = counts.contiguous();
  params.rows = params.list_rows = {0, num_rows};
  params.v_strides = packed_strides(v);
  params.v = v.const_data_ptr();
  const at::Tensor sinks = sink_logits_of(kOp, sink_logits, params.q_heads, q);
  params.sink_logits = pointer_to(sinks);
  params.indices = lists.const_data_ptr<int32_t>();
  params.counts = list_counts.const_data_ptr<int32_t>();
  params.workspace_bytes = backend.block_sparse_attention_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.block_sparse_attention(params, stream);
  return outputs.result();
}

TensorPair choose_blocks_varlen(const at::Tensor& q,
                                const at::Tensor& k,
                                const at::Tensor& cu_seqlens_q,
                                const std::optional<at::Tensor>& cu_seqlens_k,
                                int64_t max_seqlen_q,
                                int64_t max_seqlen_k,
                                const std::optional<at::Tensor>& block_table,
                                const std::optional<at::Tensor>& seqused_k,
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
  constexpr const char* kOp = "choose_blocks_varlen";
  const PackedInputs inputs(kOp, q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k);
  PipelineParams params{};
  inputs.fill(max_seqlen_q, max_seqlen_k, params);
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
  apply_settings(kOp, settings, q, params);
  if (wants_checks()) {
    check_lengths(kOp, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
                  seqused_k);
  }
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  const auto int32 = q.options().dtype(at::kInt);
  params.list_rows = {0, max_packed_blocks(params.packed, params.batch, block_size)};
  params.list_capacity = ceil_div(max_seqlen_k, block_size);
  at::Tensor indices =
      at::empty({num_proxy_heads, params.list_rows.end, params.list_capacity}, int32);
  // Query blocks behind the last sequence read nothing.
  at::Tensor counts = at::zeros({params.q_heads, params.list_rows.end}, int32);
  params.indices = indices.mutable_data_ptr<int32_t>();
  params.counts = counts.mutable_data_ptr<int32_t>();
  params.workspace_bytes = backend.choose_blocks_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.choose_blocks(params, stream);
  return {indices, counts};
}

TensorPair proxy_attention_varlen(const at::Tensor& q,
                                  const at::Tensor& k,
                                  const at::Tensor& v,
                                  const at::Tensor& cu_seqlens_q,
                                  const std::optional<at::Tensor>& cu_seqlens_k,
                                  int64_t max_seqlen_q,
                                  int64_t max_seqlen_k,
                                  const std::optional<at::Tensor>& block_table,
                                  const std::optional<at::Tensor>& seqused_k,
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
                                  const std::optional<at::Tensor>& out,
                                  std::optional<int64_t> window,
                                  const std::optional<at::Tensor>& sink_logits) {
  constexpr const char* kOp = "proxy_attention_varlen";
  const PackedInputs inputs(kOp, q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k);
  inputs.check_values(v);
  PipelineParams params{};
  inputs.fill(max_seqlen_q, max_seqlen_k, params);
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
  apply_settings(kOp, settings, q, params);
  if (wants_checks()) {
    check_lengths(kOp, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
                  seqused_k);
  }
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  PackedOutputs outputs(kOp, q, k, v, out, return_lse);
  outputs.fill(params);
  params.v_strides = packed_strides(v);
  params.v = v.const_data_ptr();
  const at::Tensor sinks = sink_logits_of(kOp, sink_logits, params.q_heads, q);
  params.sink_logits = pointer_to(sinks);
  params.workspace_bytes = backend.proxy_attention_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.proxy_attention(params, stream);
  return outputs.result();
}

}  // namespace proxyattn::binding
