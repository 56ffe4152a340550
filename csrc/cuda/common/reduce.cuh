// Reductions over the lanes of a warp. Each adds or compares in one fixed order, so results are
// the same bits in every lane and in every run. Maxima drop NaN unless both sides are NaN.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda {

inline constexpr int kQuadLanes = 4;  // the lanes that share a row of an mma accumulator

// Over aligned groups of `Lanes` neighbours, a power of two.
template <int Lanes>
PROXYATTN_DEVICE float group_max(float value) {
  PROXYATTN_UNROLL
  for (int distance = 1; distance < Lanes; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <int Lanes, typename T>
PROXYATTN_DEVICE T group_sum(T value) {
  PROXYATTN_UNROLL
  for (int distance = 1; distance < Lanes; distance *= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

}  // namespace proxyattn::cuda
