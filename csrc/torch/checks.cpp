#include "checks.h"

#include <cmath>
#include <string>

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

namespace proxyattn::binding {
namespace {

// As Python spells it: "float32".
std::string name_of(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

}  // namespace

void check_rank(const char* op, const char* name, const at::Tensor& tensor, int64_t rank) {
  TORCH_CHECK_VALUE(tensor.dim() == rank, op, ": ", name, " must have ", rank,
                    " dimensions, got shape ", tensor.sizes());
}

void check_shape(const char* op,
                 const char* name,
                 const at::Tensor& tensor,
                 at::IntArrayRef expected) {
  TORCH_CHECK_VALUE(tensor.sizes() == expected, op, ": ", name, " must have shape ", expected,
                    ", got shape ", tensor.sizes());
}

void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, op, ": ", name, " must have dtype ",
                   name_of(dtype), ", got ", name_of(tensor.scalar_type()));
}

void check_device(const char* op,
                  const char* name,
                  const at::Tensor& tensor,
                  const char* other_name,
                  const at::Tensor& other) {
  TORCH_CHECK_TYPE(tensor.device() == other.device(), op, ": ", name, " must be on the device of ",
                   other_name, ", ", other.device(), ", got ", tensor.device());
}

void check_same(const char* op,
                const char* name,
                const at::Tensor& tensor,
                const char* other_name,
                const at::Tensor& other) {
  check_device(op, name, tensor, other_name, other);
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), op, ": ", name,
                   " must have the dtype of ", other_name, ", ", name_of(other.scalar_type()),
                   ", got ", name_of(tensor.scalar_type()));
}

void check_input(const char* op,
                 const char* name,
                 const at::Tensor& tensor,
                 at::ScalarType dtype,
                 at::IntArrayRef expected,
                 const char* other_name,
                 const at::Tensor& other) {
  check_dtype(op, name, tensor, dtype);
  check_device(op, name, tensor, other_name, other);
  check_shape(op, name, tensor, expected);
}

void check_heads_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t rank) {
  check_rank(op, name, tensor, rank);
  const at::ScalarType type = tensor.scalar_type();
  const bool is_half = type == at::kHalf || type == at::kBFloat16;
  if (tensor.is_cuda()) {
    TORCH_CHECK_TYPE(is_half, op, ": ", name, " must be float16 or bfloat16 on a GPU, got ",
                     name_of(type));
  } else {
    TORCH_CHECK_TYPE(is_half || type == at::kFloat, op, ": ", name,
                     " must be float32, float16 or bfloat16, got ", name_of(type));
  }
  // A dimension of size 1 or an empty tensor has no neighbours, whatever its stride says.
  TORCH_CHECK_VALUE(tensor.numel() == 0 || tensor.size(-1) == 1 || tensor.stride(-1) == 1, op, ": ",
                    name, " must be contiguous in its last dimension, got strides ",
                    tensor.strides());
}

void check_qk(const char* op, const at::Tensor& q, const at::Tensor& k) {
  check_heads_tensor(op, "q", q);
  check_heads_tensor(op, "k", k);
  check_same(op, "k", k, "q", q);
  check_shape(op, "k", k, {q.size(0), k.size(1), k.size(2), q.size(3)});
}

void check_qkv(const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  check_qk(op, q, k);
  check_heads_tensor(op, "v", v);
  check_same(op, "v", v, "q", q);
  check_shape(op, "v", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
}

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

TokenStrides strides_of(const at::Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

Pooling pooling_of(const char* op, std::string_view name) {
  if (name == "mean") return Pooling::kMean;
  TORCH_CHECK_VALUE(name == "first", op, ": pooling must be 'mean' or 'first', got '", name, "'");
  return Pooling::kFirst;
}

BudgetMode budget_mode_of(const char* op, std::string_view name) {
  if (name == "top_p") return BudgetMode::kTopP;
  TORCH_CHECK_VALUE(name == "last_block", op,
                    ": budget_mode must be 'top_p' or 'last_block', got '", name, "'");
  return BudgetMode::kLastBlock;
}

float scale_or_default(std::optional<double> scale, int64_t head_dim) {
  if (scale.has_value()) return static_cast<float>(*scale);
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

at::Tensor addressable(const at::Tensor& tensor) {
  return tensor.numel() > 0 ? tensor.contiguous() : at::empty({1}, tensor.options());
}

at::Tensor make_workspace(const at::Tensor& like, int64_t bytes) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

at::Tensor unused_output(const at::Tensor& like) {
  return at::empty({0}, like.options().dtype(at::kFloat));
}

}  // namespace proxyattn::binding
