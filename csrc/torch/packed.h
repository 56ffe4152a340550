// Packed sequences as the varlen ops take them: q, k and v without a batch, the tensors that say
// where sequences are, and outputs that the caller may have brought along.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "proxyattn/sequences.h"
#include "proxyattn/types.h"

#include "checks.h"
#include "ops.h"

namespace proxyattn::binding {

// Of [tokens, heads, head_dim], or of [pages, page_len, heads, head_dim].
TokenStrides packed_strides(const at::Tensor& tensor);

class PackedInputs {
 public:
  PackedInputs(const char* op,
               const at::Tensor& q,
               const at::Tensor& k,
               const at::Tensor& cu_seqlens_q,
               const std::optional<at::Tensor>& cu_seqlens_k,
               const std::optional<at::Tensor>& block_table,
               const std::optional<at::Tensor>& seqused_k);

  // Raises unless v is laid out as k is.
  void check_values(const at::Tensor& v) const;

  // What params say about q and k. They point into this object's tensors from then on.
  template <typename Params>
  void fill(int64_t max_seqlen_q, int64_t max_seqlen_k, Params& params) const {
    params.batch = num_sequences_;
    params.q_len = max_seqlen_q;
    params.kv_len = max_seqlen_k;
    params.q_heads = q_.size(1);
    params.kv_heads = k_.size(-2);
    params.head_dim = q_.size(2);
    params.q_strides = packed_strides(q_);
    params.k_strides = packed_strides(k_);
    params.q = q_.const_data_ptr();
    params.k = k_.const_data_ptr();
    params.dtype = dtype_of(q_);
    params.packed = sequences_;
  }

 private:
  void check_keys(const char* name, const at::Tensor& tensor) const;

  const char* op_;
  const at::Tensor& q_;
  const at::Tensor& k_;
  int64_t num_sequences_ = 0;
  at::Tensor q_starts_, kv_starts_, page_table_, kv_lens_;
  PackedSequences sequences_;
};

// What attention over packed sequences writes: out, the caller's or a new one, and lse if wanted.
class PackedOutputs {
 public:
  PackedOutputs(const char* op,
                const at::Tensor& q,
                const at::Tensor& k,
                const at::Tensor& v,
                const std::optional<at::Tensor>& given,
                bool return_lse);

  template <typename Params>
  void fill(Params& params) {
    params.out_strides = packed_strides(out_);
    params.out = out_.mutable_data_ptr();
    params.lse = lse_.numel() > 0 ? lse_.mutable_data_ptr<float>() : nullptr;
    params.lse_pitch = out_.size(0);
  }

  // What the op returns, which must not be the caller's own tensor.
  TensorPair result() const { return {result_, lse_}; }

 private:
  at::Tensor out_, lse_, result_;
};

}  // namespace proxyattn::binding
