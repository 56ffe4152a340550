// Integer helpers shared by host and device code.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PROXYATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PROXYATTN_HOST_DEVICE inline
#endif

namespace proxyattn {

template <typename Int>
PROXYATTN_HOST_DEVICE constexpr Int ceil_div(Int numerator, Int denominator) {
  return (numerator + denominator - 1) / denominator;
}

// Of numbers below 0 too, where / would round up. The denominator is positive.
template <typename Int>
PROXYATTN_HOST_DEVICE constexpr Int floor_div(Int numerator, Int denominator) {
  return numerator / denominator - (numerator % denominator < 0 ? 1 : 0);
}

template <typename Int>
PROXYATTN_HOST_DEVICE constexpr Int round_up(Int value, Int multiple) {
  return ceil_div(value, multiple) * multiple;
}

template <typename Int>
PROXYATTN_HOST_DEVICE constexpr Int min_of(Int a, Int b) {
  return a < b ? a : b;
}

template <typename Int>
PROXYATTN_HOST_DEVICE constexpr Int max_of(Int a, Int b) {
  return a < b ? b : a;
}

}  // namespace proxyattn
