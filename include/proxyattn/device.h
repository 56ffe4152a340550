// What this build can run: architectures, kernels, and the capability of a device.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "proxyattn/types.h"

namespace proxyattn {

// One kernel that block_sparse_attention can pick.
struct KernelConfig {
  const char* device;  // "cpu" or "cuda"
  const char* family;  // instruction family: "avx2", "sm80", "sm90", ...
  int64_t head_dim;
  DType dtype;
};

const char* dtype_name(DType dtype);

namespace cpu {
// Kernels of this build that the running processor supports, fastest family first.
std::vector<KernelConfig> supported_configs();
// Threads that the CPU kernels use when called from this thread, at most: PROXYATTN_NUM_THREADS or
// every core this process may run on, until set. Workspace sizes depend on it, results don't.
int num_threads();
void set_num_threads(int count);
}  // namespace cpu

namespace cuda {
std::vector<KernelConfig> supported_configs();
std::string built_architectures();  // as given to the compiler: "80 86 89 90a"
int runtime_version();              // CUDA runtime this was compiled against, 13000 is 13.0
// 10 * major + minor of a device.
int device_capability(int device);
}  // namespace cuda

}  // namespace proxyattn
