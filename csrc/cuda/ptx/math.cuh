// Functions that need their instruction by name: approximations, called where their error is
// wanted, and a maximum that keeps NaN.
#pragma once

namespace proxyattn::cuda::ptx {

// 2^x within 2 units in the last place; denormal results are flushed to zero, ex2(-inf) is 0.
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x); -inf for 0 and for denormals, NaN below.
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The larger of two numbers, NaN if either is one; fmaxf would drop it.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

}  // namespace proxyattn::cuda::ptx
