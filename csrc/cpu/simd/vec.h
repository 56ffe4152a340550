// Vectors of floats as wide as the instruction family's registers, and the functions on them that
// the kernels need. Included by family.cpp only: everything has internal linkage, so that no
// function compiled for one family is ever linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

#define PROXYATTN_INLINE inline __attribute__((always_inline))

namespace proxyattn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * sizeof(float))));
using BitsVec = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using IntVec = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

PROXYATTN_INLINE Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

PROXYATTN_INLINE IntVec load(const int32_t* from) {
  IntVec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

PROXYATTN_INLINE void store(float* to, Vec v) {
  std::memcpy(to, &v, sizeof(v));
}

PROXYATTN_INLINE Vec splat(float value) {
  return value - Vec{};
}

// `a` where it is larger, `b` otherwise: a NaN in `a` is passed over.
PROXYATTN_INLINE Vec max(Vec a, Vec b) {
  return a > b ? a : b;
}

// exp(x) for x <= 88 to about one unit in the last place; results below the smallest normal number
// are 0, exp(0) is exactly 1 and NaN stays NaN. x = n ln 2 + r with n an integer, and exp(r) is
// 1 + r + r^2 P(r) with P fitted to the smallest maximal relative error (3e-9) on |r| <= ln(2)/2.
PROXYATTN_INLINE Vec exp(Vec x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2Upper = 0x1.62e4p-1f;  // 14 bits, so that n * kLn2Upper is exact
  constexpr float kLn2Lower = 1.42860677e-6f;
  constexpr float kSmallest = -87.33654f;  // ln of the smallest normal number
  constexpr float kRound = 0x1.8p23f;      // adding it leaves n in the lowest bits
  const Vec shifted = x * kLog2E + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * kLn2Upper) - n * kLn2Lower;
  Vec p = splat(1.381459878757596e-3f);
  p = p * r + 8.368716575205326e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 4.999999403953552e-1f;
  const Vec exp_r = p * (r * r) + (r + 1.0f);
  const BitsVec power_bits = (reinterpret_cast<BitsVec>(shifted) << 23) + 0x3f800000u;
  const Vec result = exp_r * reinterpret_cast<Vec>(power_bits);
  return x < kSmallest ? Vec{} : result;
}

}  // namespace
}  // namespace proxyattn::cpu
