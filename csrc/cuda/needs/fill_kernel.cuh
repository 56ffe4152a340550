// Stage 3 where no head's attention decides: the same value for every head.
#pragma once

#include <cstdint>

namespace proxyattn::cuda {

inline constexpr int kFillThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kFillThreads) fill_kernel(T* values, int64_t count, T value) {
  const int64_t idx = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
  if (idx < count) values[idx] = value;
}

}  // namespace proxyattn::cuda
