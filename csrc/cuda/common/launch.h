// The one way to start a kernel: sets dynamic shared memory once per kernel and device, refuses a
// grid over the hardware's limits, and checks the result of the launch.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "proxyattn/error.h"
#include "proxyattn/types.h"

#include "cuda/common/check.h"
#include "cuda/common/high_water.h"

namespace proxyattn::cuda {

inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int64_t kMaxGridYZ = 65535;

struct LaunchShape {
  int64_t grid_x;  // the longest dimension
  int64_t grid_y = 1;
  int64_t grid_z = 1;
  int threads = 128;
  int shared_bytes = 0;
};

inline int current_device(const char* op) {
  int device = 0;
  PROXYATTN_CUDA_CALL(op, cudaGetDevice(&device));
  return device;
}

inline int device_attribute(const char* op, cudaDeviceAttr attribute) {
  int value = 0;
  PROXYATTN_CUDA_CALL(op, cudaDeviceGetAttribute(&value, attribute, current_device(op)));
  return value;
}

// The 48 KiB that a kernel gets without asking are for its static shared memory too, so it asks for
// whatever is dynamic. Kernel is a template argument so that each kernel has its own record of
// prepared devices.
template <auto Kernel>
void allow_shared_memory(const char* op, int shared_bytes) {
  if (shared_bytes == 0) return;
  // Never destroyed: other threads may launch while the process ends.
  static HighWater& allowed = *new HighWater;
  allowed.reach(current_device(op), shared_bytes, [&] {
    PROXYATTN_CUDA_CALL(op, cudaFuncSetAttribute(
                                Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  });
}

// Starts nothing when the grid is empty.
template <auto Kernel, typename... Args>
void launch(const char* op, const LaunchShape& shape, Stream stream, const Args&... args) {
  if (shape.grid_x == 0 || shape.grid_y == 0 || shape.grid_z == 0) return;
  if (shape.grid_x > kMaxGridX || shape.grid_y > kMaxGridYZ || shape.grid_z > kMaxGridYZ) {
    throw CudaError(join_message(op, ": grid must be at most ", kMaxGridX, " x ", kMaxGridYZ, " x ",
                                 kMaxGridYZ, " thread blocks, got ", shape.grid_x, " x ",
                                 shape.grid_y, " x ", shape.grid_z));
  }
  allow_shared_memory<Kernel>(op, shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                        static_cast<unsigned>(shape.grid_z));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = stream;
  // Not <<<>>>, after which only the last error tells how it went: that of whoever failed before.
  PROXYATTN_CUDA_CALL(op, cudaLaunchKernelEx(&config, Kernel, args...));
}

}  // namespace proxyattn::cuda
