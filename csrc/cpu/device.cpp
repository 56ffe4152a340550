#include "proxyattn/device.h"

#include "cpu/simd/kernels.h"

namespace proxyattn::cpu {

std::vector<KernelConfig> supported_configs() {
  std::vector<KernelConfig> configs;
  for (const Kernels* family : supported_kernels()) {
    for (const int64_t head_dim : kHeadDims) {
      for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
        configs.push_back({"cpu", family->family, head_dim, dtype});
      }
    }
  }
  return configs;
}

}  // namespace proxyattn::cpu
