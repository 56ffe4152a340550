#include <atomic>

#include "cpu/simd/kernels.h"

namespace proxyattn::cpu {

#ifdef PROXYATTN_X86_FAMILIES
extern const Kernels kKernels_avx512;
extern const Kernels kKernels_avx2;
#endif
extern const Kernels kKernels_baseline;

namespace {

std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found;
#ifdef PROXYATTN_X86_FAMILIES
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kKernels_avx512);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kKernels_avx2);
  }
#endif
  found.push_back(&kKernels_baseline);
  return found;
}

std::atomic<const Kernels*>& chosen_kernels() {
  static std::atomic<const Kernels*> chosen{supported_kernels().front()};
  return chosen;
}

}  // namespace

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> found = find_supported();
  return found;
}

const Kernels& kernels() {
  return *chosen_kernels();
}

void use_kernels(const Kernels& chosen) {
  chosen_kernels() = &chosen;
}

}  // namespace proxyattn::cpu
