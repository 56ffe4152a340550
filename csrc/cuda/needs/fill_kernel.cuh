// Stage 3 where no head's attention decides: the same value for every head, or for every head of a
// sequence.
#pragma once

#include <cstdint>

#include "cuda/needs/layout.h"

namespace proxyattn::cuda {

inline constexpr int kFillThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kFillThreads) fill_kernel(T* values, int64_t count, T value) {
  const int64_t idx = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
  if (idx < count) values[idx] = value;
}

// Budgets of packed sequences: `most` or all key blocks, if there are any to count.
static __global__ void __launch_bounds__(kFillThreads) fill_packed_kernel(
    const __grid_constant__ NeedLayout p, int32_t* budgets, int64_t count, int32_t most) {
  const int64_t idx = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
  if (idx < count) budgets[idx] = min_of(p.head_mass(idx).num_blocks, most);
}

}  // namespace proxyattn::cuda
