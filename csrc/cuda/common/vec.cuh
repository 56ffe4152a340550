// 16-bit element types, two to a register and eight to a 16-byte chunk.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/macros.cuh"

namespace proxyattn::cuda {

inline constexpr int kChunkBytes = 16;  // the widest load, store and asynchronous copy
inline constexpr int kChunkElements = 8;

PROXYATTN_DEVICE float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
PROXYATTN_DEVICE float to_float(__half x) {
  return __half2float(x);
}

// Rounds to nearest even; `low` lands in the lower half of the register.
template <typename Element>
PROXYATTN_DEVICE uint32_t pack_pair(float low, float high);

template <>
PROXYATTN_DEVICE uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
PROXYATTN_DEVICE uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

template <typename Element>
PROXYATTN_DEVICE float2 unpack_pair(uint32_t pair);

template <>
PROXYATTN_DEVICE float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
PROXYATTN_DEVICE float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Eight neighbours read one by one, for addresses that are not multiples of 16 bytes.
template <typename Element>
PROXYATTN_DEVICE uint4 gather_chunk(const Element* source) {
  static_assert(sizeof(Element) == 2);
  const auto* bits = reinterpret_cast<const uint16_t*>(source);
  const auto pair = [&](int i) {
    return static_cast<uint32_t>(bits[i]) | static_cast<uint32_t>(bits[i + 1]) << 16;
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

// The opposite: eight neighbours written one by one.
template <typename Element>
PROXYATTN_DEVICE void scatter_chunk(Element* target, const uint4& chunk) {
  static_assert(sizeof(Element) == 2);
  auto* bits = reinterpret_cast<uint16_t*>(target);
  const uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  PROXYATTN_UNROLL
  for (int i = 0; i < 4; ++i) {
    bits[2 * i] = static_cast<uint16_t>(pairs[i]);
    bits[2 * i + 1] = static_cast<uint16_t>(pairs[i] >> 16);
  }
}

}  // namespace proxyattn::cuda
