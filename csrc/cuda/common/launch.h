// The one way to start a kernel: sets large shared memory once per kernel and device, refuses a
// grid over the hardware's limits, and checks the result of the launch.
#pragma once

#include <atomic>
#include <cstdint>

#include <cuda_runtime.h>

#include "proxyattn/error.h"
#include "proxyattn/types.h"

#include "cuda/common/check.h"

namespace proxyattn::cuda {

inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int64_t kMaxGridYZ = 65535;
inline constexpr int kStaticSharedLimit = 48 * 1024;  // bytes a kernel gets without asking
inline constexpr int kMaxDevices = 64;

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

// Kernel is a template argument so that each kernel has its own record of prepared devices.
template <auto Kernel>
void allow_shared_memory(const char* op, int shared_bytes) {
  if (shared_bytes <= kStaticSharedLimit) return;
  static std::atomic<int> allowed[kMaxDevices] = {};
  const int device = current_device(op);
  if (device < kMaxDevices && allowed[device].load(std::memory_order_relaxed) >= shared_bytes) {
    return;
  }
  PROXYATTN_CUDA_CALL(
      op, cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  if (device < kMaxDevices) allowed[device].store(shared_bytes, std::memory_order_relaxed);
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
  const dim3 grid(static_cast<unsigned>(shape.grid_x), static_cast<unsigned>(shape.grid_y),
                  static_cast<unsigned>(shape.grid_z));
  const dim3 block(static_cast<unsigned>(shape.threads));
  Kernel<<<grid, block, static_cast<size_t>(shape.shared_bytes), stream>>>(args...);
  PROXYATTN_CUDA_CALL(op, cudaGetLastError());
}

}  // namespace proxyattn::cuda
