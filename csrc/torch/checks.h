// Rules about torch tensors: rank, dtype, device, layout. Rules about values live in the core.
#pragma once

#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include "proxyattn/types.h"

namespace proxyattn::binding {

void check_shape(const char* op,
                 const char* name,
                 const at::Tensor& tensor,
                 at::IntArrayRef expected);
void check_rank(const char* op, const char* name, const at::Tensor& tensor, int64_t rank);
void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype);
void check_device(const char* op,
                  const char* name,
                  const at::Tensor& tensor,
                  const char* other_name,
                  const at::Tensor& other);
// The device and the dtype of another tensor.
void check_same(const char* op,
                const char* name,
                const at::Tensor& tensor,
                const char* other_name,
                const at::Tensor& other);

// A whole input: its dtype, the device of another tensor, its shape.
void check_input(const char* op,
                 const char* name,
                 const at::Tensor& tensor,
                 at::ScalarType dtype,
                 at::IntArrayRef expected,
                 const char* other_name,
                 const at::Tensor& other);

// A [batch, tokens, heads, head_dim] tensor, or a packed one without the batch: the rank, a
// floating type that its device has kernels for, last dimension contiguous.
void check_heads_tensor(const char* op,
                        const char* name,
                        const at::Tensor& tensor,
                        int64_t rank = 4);

// q and k, or q, k and v as attention takes them: each a heads tensor, shapes that fit together.
// Where they only fit with tokens and heads exchanged, the error says so.
void check_qk(const char* op, const at::Tensor& q, const at::Tensor& k, bool causal);
void check_qkv(
    const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal);

DType dtype_of(const at::Tensor& tensor);
TokenStrides strides_of(const at::Tensor& tensor);

Pooling pooling_of(const char* op, std::string_view name);
BudgetMode budget_mode_of(const char* op, std::string_view name);

// 1 / sqrt(head_dim) unless the caller gave a scale.
float scale_or_default(std::optional<double> scale, int64_t head_dim);

// The core's number for a window of so many keys, at least 1, or for none.
int64_t window_or_all(const char* op, std::optional<int64_t> window);

// fp32 [q_heads], one after another; raises if it is anything else. Undefined if there is none.
at::Tensor sink_logits_of(const char* op,
                          const std::optional<at::Tensor>& sink_logits,
                          int64_t q_heads,
                          const at::Tensor& q);
// Null if there is none.
const float* pointer_to(const at::Tensor& sink_logits);

// The elements one after another, and at an address even if there are none: no address would mean
// that the tensor was not given.
at::Tensor addressable(const at::Tensor& tensor);

// Scratch of `bytes` bytes on the tensor's device.
at::Tensor make_workspace(const at::Tensor& like, int64_t bytes);
// What an op returns for an output that was not asked for: fp32, shape [0].
at::Tensor unused_output(const at::Tensor& like);

}  // namespace proxyattn::binding
