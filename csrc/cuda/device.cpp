#include "proxyattn/device.h"

#include <cuda_runtime_api.h>

#include "common/math.h"
#include "cuda/attention/dispatch.h"
#include "cuda/common/check.h"

namespace proxyattn::cuda {

std::string built_architectures() {
  return PROXYATTN_BUILT_ARCHS;
}

int runtime_version() {
  return CUDART_VERSION;
}

int device_capability(int device) {
  int major = 0;
  int minor = 0;
  PROXYATTN_CUDA_CALL("device_capability",
                      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  PROXYATTN_CUDA_CALL("device_capability",
                      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return 10 * major + minor;
}

}  // namespace proxyattn::cuda
