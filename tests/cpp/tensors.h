// [batch, token, head, head_dim] tensors of any element type and strides, for the C++ tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "proxyattn/types.h"

#include "common/half.h"
#include "random.h"

namespace proxyattn::test {

class Tensor {
 public:
  // Rows stand `padding` elements further apart than they need to. Elements are NaN until set.
  Tensor(DType dtype,
         int64_t batch,
         int64_t tokens,
         int64_t heads,
         int64_t head_dim,
         int64_t padding = 0)
      : strides{tokens * heads * (head_dim + padding), heads * (head_dim + padding),
                head_dim + padding},
        dtype(dtype),
        batch(batch),
        tokens(tokens),
        heads(heads),
        head_dim(head_dim),
        elements_(static_cast<std::size_t>(batch * strides.batch * element_bytes())) {
    for (int64_t i = 0; i < batch * strides.batch; ++i) {
      set_element(i, std::numeric_limits<float>::quiet_NaN());
    }
  }

  Tensor& fill_normal(unsigned seed, float scale = 1.0f) {
    const std::size_t count = static_cast<std::size_t>(batch * tokens * heads * head_dim);
    const std::vector<float> values = normal_floats(count, seed, scale);
    std::size_t i = 0;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t h = 0; h < heads; ++h) {
          for (int64_t d = 0; d < head_dim; ++d) set(b, t, h, d, values[i++]);
        }
      }
    }
    return *this;
  }

  void set(int64_t b, int64_t t, int64_t h, int64_t d, float value) {
    set_element(offset(b, t, h, d), value);
  }

  double at(int64_t b, int64_t t, int64_t h, int64_t d) const {
    const int64_t i = offset(b, t, h, d);
    if (dtype == DType::kFloat32) return static_cast<double>(read<float>(i));
    if (dtype == DType::kFloat16) return static_cast<double>(read<Float16>(i).to_float());
    return static_cast<double>(read<BFloat16>(i).to_float());
  }

  const void* data() const { return elements_.data(); }
  void* data() { return elements_.data(); }
  bool same_bits(const Tensor& other) const { return elements_ == other.elements_; }

  const TokenStrides strides;
  const DType dtype;
  const int64_t batch, tokens, heads, head_dim;

 private:
  int64_t element_bytes() const { return dtype == DType::kFloat32 ? 4 : 2; }
  int64_t offset(int64_t b, int64_t t, int64_t h, int64_t d) const {
    return b * strides.batch + t * strides.token + h * strides.head + d;
  }

  template <typename T>
  T read(int64_t i) const {
    T value;
    std::memcpy(&value, elements_.data() + i * element_bytes(), sizeof(value));
    return value;
  }
  template <typename T>
  void write(int64_t i, T value) {
    std::memcpy(elements_.data() + i * element_bytes(), &value, sizeof(value));
  }

  void set_element(int64_t i, float value) {
    if (dtype == DType::kFloat32) write(i, value);
    if (dtype == DType::kFloat16) write(i, Float16::from_float(value));
    if (dtype == DType::kBFloat16) write(i, BFloat16::from_float(value));
  }

  std::vector<unsigned char> elements_;
};

inline constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// Half a unit in the last place of values near 1.
inline double rounding_unit(DType dtype) {
  if (dtype == DType::kFloat32) return 0x1p-24;
  return dtype == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}

// Scratch of a stage, asked for and handed in as a caller does; sets params.workspace.
class Workspace {
 public:
  template <typename Params>
  Workspace(Params& params, int64_t bytes) : memory_(static_cast<std::size_t>(bytes), 0xff) {
    params.workspace = memory_.empty() ? nullptr : memory_.data();
    params.workspace_bytes = bytes;
  }

 private:
  std::vector<unsigned char> memory_;
};

}  // namespace proxyattn::test
