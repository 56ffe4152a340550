// Softmax in base 2 with a running maximum, as every streaming kernel here keeps it:
//   p = 2^(factor * s - reference(m)),  factor = scale * log2(e),  m = max of the s seen so far
// with the logits s unscaled, so that one multiply-add feeds the exponential.
//
// A masked logit is -inf and gives p = 0. While m is still -inf the reference is 0, which keeps
// -inf - (-inf) away. Maxima drop NaN, but the exponential of a NaN logit is NaN, so it shows in
// the sum and in the output.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/ptx/math.cuh"

namespace proxyattn::cuda {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr float kMinusInfinity = -__builtin_huge_valf();

PROXYATTN_DEVICE float softmax_reference(float row_max, float factor) {
  return row_max == kMinusInfinity ? 0.0f : __fmul_rn(row_max, factor);
}

// What sums taken against `old_max` must be multiplied by to stand against `reference`. The
// product is rounded by itself, as in softmax_reference, so that a maximum that did not move
// gives exactly 1.
PROXYATTN_DEVICE float softmax_rescale(float old_max, float reference, float factor) {
  return ptx::ex2(__fmul_rn(old_max, factor) - reference);
}

PROXYATTN_DEVICE float softmax_weight(float logit, float reference, float factor) {
  return ptx::ex2(fmaf(logit, factor, -reference));
}

// Natural log of the sum of exp(scale * s); -inf for a row that saw nothing.
PROXYATTN_DEVICE float log_sum(float row_max, float row_sum, float factor) {
  if (row_sum == 0.0f) return kMinusInfinity;
  return (softmax_reference(row_max, factor) + log2f(row_sum)) * kLn2;
}

}  // namespace proxyattn::cuda
