#include "packed.h"

#include <vector>

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "common/validate.h"

namespace proxyattn::binding {
namespace {

void check_int32(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rank, const at::Tensor& q) {
  check_rank(op, name, tensor, rank);
  check_dtype(op, name, tensor, at::kInt);
  check_device(op, name, tensor, "q", q);
}

void check_apart(const char* op, const at::Tensor& out, const char* name, const at::Tensor& input) {
  const at::MemOverlapStatus status = at::get_overlap_status(out, input);
  const bool apart =
      status != at::MemOverlapStatus::Full && status != at::MemOverlapStatus::Partial;
  TORCH_CHECK_VALUE(apart, op, ": out must not share memory with ", name, ", got tensors that do");
}

}  // namespace

TokenStrides packed_strides(const at::Tensor& tensor) {
  return {tensor.dim() == 4 ? tensor.stride(0) : 0, tensor.stride(-3), tensor.stride(-2)};
}

PackedInputs::PackedInputs(const char* op,
                           const at::Tensor& q,
                           const at::Tensor& k,
                           const at::Tensor& cu_seqlens_q,
                           const std::optional<at::Tensor>& cu_seqlens_k,
                           const std::optional<at::Tensor>& block_table,
                           const std::optional<at::Tensor>& seqused_k)
    : op_(op), q_(q), k_(k) {
  check_heads_tensor(op, "q", q, 3);
  check_int32(op, "cu_seqlens_q", cu_seqlens_q, 1, q);
  TORCH_CHECK_VALUE(cu_seqlens_q.size(0) >= 1, op,
                    ": cu_seqlens_q must have an element more than there are sequences, got shape ",
                    cu_seqlens_q.sizes());
  num_sequences_ = cu_seqlens_q.size(0) - 1;
  q_starts_ = addressable(cu_seqlens_q);
  sequences_.q_starts = q_starts_.const_data_ptr<int32_t>();
  sequences_.total_q = q.size(0);
  if (cu_seqlens_k.has_value()) {
    check_input(op, "cu_seqlens_k", *cu_seqlens_k, at::kInt, {num_sequences_ + 1}, "q", q);
    kv_starts_ = addressable(*cu_seqlens_k);
    sequences_.kv_starts = kv_starts_.const_data_ptr<int32_t>();
  }
  if (seqused_k.has_value()) {
    check_input(op, "seqused_k", *seqused_k, at::kInt, {num_sequences_}, "q", q);
    kv_lens_ = addressable(*seqused_k);
    sequences_.kv_lens = kv_lens_.const_data_ptr<int32_t>();
  }
  if (block_table.has_value()) {
    check_int32(op, "block_table", *block_table, 2, q);
    check_shape(op, "block_table", *block_table, {num_sequences_, block_table->size(1)});
    page_table_ = addressable(*block_table);
    sequences_.page_table = page_table_.const_data_ptr<int32_t>();
    sequences_.table_pages = block_table->size(1);
  }
  validate_key_places(sequences_, op);
  check_keys("k", k);
  if (block_table.has_value()) {
    sequences_.num_pages = k.size(0);
    sequences_.page_len = k.size(1);
  } else {
    sequences_.total_kv = k.size(0);
  }
}

void PackedInputs::check_keys(const char* name, const at::Tensor& tensor) const {
  check_heads_tensor(op_, name, tensor, sequences_.page_table == nullptr ? 3 : 4);
  check_same(op_, name, tensor, "q", q_);
  std::vector<int64_t> expected = k_.sizes().vec();
  expected.back() = q_.size(2);
  check_shape(op_, name, tensor, expected);
}

void PackedInputs::check_values(const at::Tensor& v) const {
  check_keys("v", v);
}

PackedOutputs::PackedOutputs(const char* op,
                             const at::Tensor& q,
                             const at::Tensor& k,
                             const at::Tensor& v,
                             const std::optional<at::Tensor>& given,
                             bool return_lse)
    : out_(given.has_value() ? *given : at::empty(q.sizes(), q.options())),
      lse_(return_lse ? at::empty({q.size(1), q.size(0)}, q.options().dtype(at::kFloat))
                      : unused_output(q)),
      result_(out_) {
  if (!given.has_value()) return;
  result_ = unused_output(q);
  check_heads_tensor(op, "out", out_, 3);
  check_same(op, "out", out_, "q", q);
  check_shape(op, "out", out_, q.sizes());
  TORCH_CHECK_VALUE(at::has_internal_overlap(out_) != at::MemOverlap::Yes, op,
                    ": out must have a place of its own for every element, got strides ",
                    out_.strides());
  check_apart(op, out_, "q", q);
  check_apart(op, out_, "k", k);
  check_apart(op, out_, "v", v);
}

}  // namespace proxyattn::binding
