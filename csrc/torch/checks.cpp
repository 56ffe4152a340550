#include "checks.h"

#include <cmath>
#include <string>
#include <utility>

#include <ATen/ops/empty.h>
#include <c10/core/ScalarType.h>

namespace proxyattn::binding {
namespace {

// As Python spells it: "float32".
std::string name_of(at::ScalarType dtype) {
  return std::string(c10::getDtypeNames(dtype).first);
}

// A tensor's tokens and heads, as they are meant to be and exchanged.
struct Tokens {
  int64_t tokens;
  int64_t heads;

  explicit Tokens(const at::Tensor& tensor) : tokens(tensor.size(1)), heads(tensor.size(2)) {}
  Tokens exchanged() const {
    Tokens other = *this;
    std::swap(other.tokens, other.heads);
    return other;
  }
};

bool fit(const Tokens& q, const Tokens& k, bool causal) {
  return k.heads > 0 && q.heads % k.heads == 0 && (!causal || q.tokens <= k.tokens);
}

// [B, heads, tokens, D] is a shape like any other, so it is only known for what it is where the
// shapes as given can't be right, and those with more tokens than heads after the exchange can.
// With equal heads, or as many tokens as keys and no causal rule, both are right and nothing can be
// known.
void check_layout(const char* op, const at::Tensor& q, const at::Tensor& k, bool causal) {
  const Tokens given_q(q), given_k(k);
  if (fit(given_q, given_k, causal)) return;
  const bool few_q = given_q.tokens < given_q.heads;
  const bool few_k = given_k.tokens < given_k.heads;
  const char* rule = " must have shape [batch, tokens, heads, head_dim], got ";
  TORCH_CHECK_VALUE(!few_q || !few_k || !fit(given_q.exchanged(), given_k.exchanged(), causal), op,
                    ": q and k", rule, q.sizes(), " and ", k.sizes(),
                    ", which fit as [batch, heads, tokens, head_dim]");
  TORCH_CHECK_VALUE(!few_k || !fit(given_q, given_k.exchanged(), causal), op, ": k", rule,
                    k.sizes(), ", which fits q as [batch, heads, tokens, head_dim]");
  TORCH_CHECK_VALUE(!few_q || !fit(given_q.exchanged(), given_k, causal), op, ": q", rule,
                    q.sizes(), ", which fits k as [batch, heads, tokens, head_dim]");
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

void check_qk(const char* op, const at::Tensor& q, const at::Tensor& k, bool causal) {
  check_heads_tensor(op, "q", q);
  check_heads_tensor(op, "k", k);
  check_same(op, "k", k, "q", q);
  check_shape(op, "k", k, {q.size(0), k.size(1), k.size(2), q.size(3)});
  check_layout(op, q, k, causal);
}

void check_qkv(
    const char* op, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, bool causal) {
  check_qk(op, q, k, causal);
  check_heads_tensor(op, "v", v);
  check_same(op, "v", v, "q", q);
  TORCH_CHECK_VALUE(v.sizes() == k.sizes() || v.sizes() != k.transpose(1, 2).sizes(), op,
                    ": v must have the layout of k, [batch, tokens, heads, head_dim], got shape ",
                    v.sizes(), " with k of shape ", k.sizes());
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

int64_t window_or_all(const char* op, std::optional<int64_t> window) {
  constexpr int64_t kAll = 0;
  if (!window.has_value()) return kAll;
  TORCH_CHECK_VALUE(*window >= 1, op, ": window must be at least 1, got window=", *window);
  return *window;
}

at::Tensor sink_logits_of(const char* op,
                          const std::optional<at::Tensor>& sink_logits,
                          int64_t q_heads,
                          const at::Tensor& q) {
  if (!sink_logits.has_value()) return {};
  check_input(op, "sink_logits", *sink_logits, at::kFloat, {q_heads}, "q", q);
  return addressable(*sink_logits);
}

const float* pointer_to(const at::Tensor& sink_logits) {
  return sink_logits.defined() ? sink_logits.const_data_ptr<float>() : nullptr;
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
