// Places in [batch, token, head, head_dim] tensors of any element type.
#pragma once

#include <cstddef>
#include <cstdint>

#include "proxyattn/types.h"

namespace proxyattn {

inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// The element `offset` elements behind `base`.
inline const void* element_at(const void* base, int64_t offset, DType dtype) {
  return static_cast<const std::byte*>(base) + offset * element_bytes(dtype);
}
inline void* element_at(void* base, int64_t offset, DType dtype) {
  return static_cast<std::byte*>(base) + offset * element_bytes(dtype);
}

// The tensor from one of its tokens on; null if there is none.
template <typename Void>
Void* from_token(Void* tensor, const TokenStrides& strides, int64_t token, DType dtype) {
  return tensor == nullptr ? nullptr : element_at(tensor, token * strides.token, dtype);
}

}  // namespace proxyattn
