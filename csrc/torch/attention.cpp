#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "common/math.h"
#include "common/validate.h"
#include "device_checks.h"
#include "ops.h"

namespace proxyattn::binding {

TensorPair block_sparse_attention(const at::Tensor& q,
                                  const at::Tensor& k,
                                  const at::Tensor& v,
                                  const at::Tensor& indices,
                                  const at::Tensor& counts,
                                  int64_t block_size,
                                  bool causal,
                                  std::optional<double> scale,
                                  bool return_lse,
                                  std::optional<int64_t> window,
                                  const std::optional<at::Tensor>& sink_logits) {
  constexpr const char* kOp = "block_sparse_attention";
  check_qkv(kOp, q, k, v, causal);
  check_rank(kOp, "indices", indices, 4);
  check_dtype(kOp, "indices", indices, at::kInt);
  check_device(kOp, "indices", indices, "q", q);
  check_rank(kOp, "counts", counts, 3);
  check_dtype(kOp, "counts", counts, at::kInt);
  check_device(kOp, "counts", counts, "q", q);

  AttentionParams params{};
  params.batch = q.size(0);
  params.q_len = q.size(1);
  params.kv_len = k.size(1);
  params.q_heads = q.size(2);
  params.kv_heads = k.size(2);
  params.head_dim = q.size(3);
  params.list_heads = indices.size(1);
  params.list_capacity = indices.size(3);
  params.q_block = block_size;
  params.kv_block = block_size;
  params.q_offset = params.kv_len - params.q_len;
  params.scale = scale_or_default(scale, params.head_dim);
  params.causal = causal;
  params.window = window_or_all(kOp, window);
  params.dtype = dtype_of(q);
  validate_attention(params);
  validate_aligned_lengths(kOp, params.q_len, params.kv_len, causal);

  params.rows = params.list_rows = {0, ceil_div(params.q_len, block_size)};
  params.lse_pitch = params.q_len;
  check_shape(kOp, "indices", indices,
              {params.batch, params.list_heads, params.rows.end, params.list_capacity});
  check_shape(kOp, "counts", counts, {params.batch, params.q_heads, params.rows.end});
  if (wants_checks()) check_block_lists(indices, counts, params.kv_len, block_size);
  const Backend& backend = backend_of(kOp, q);
  const c10::DeviceGuard guard(q.device());
  const Stream stream = backend.begin(q);

  at::Tensor out =
      at::empty({params.batch, params.q_len, params.q_heads, params.head_dim}, q.options());
  at::Tensor lse = return_lse ? at::empty({params.batch, params.q_heads, params.q_len},
                                          q.options().dtype(at::kFloat))
                              : unused_output(q);
  const at::Tensor lists = addressable(indices);
  const at::Tensor list_counts = counts.contiguous();
  const at::Tensor sinks = sink_logits_of(kOp, sink_logits, params.q_heads, q);
  params.q_strides = strides_of(q);
  params.k_strides = strides_of(k);
  params.v_strides = strides_of(v);
  params.out_strides = strides_of(out);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.indices = lists.const_data_ptr<int32_t>();
  params.counts = list_counts.const_data_ptr<int32_t>();
  params.sink_logits = pointer_to(sinks);
  params.out = out.mutable_data_ptr();
  params.lse = return_lse ? lse.mutable_data_ptr<float>() : nullptr;
  params.workspace_bytes = backend.block_sparse_attention_workspace_bytes(params);
  const at::Tensor workspace = make_workspace(q, params.workspace_bytes);
  params.workspace = workspace.mutable_data_ptr();
  backend.block_sparse_attention(params, stream);
  return {out, lse};
}

}  // namespace proxyattn::binding
