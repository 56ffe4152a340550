#include <atomic>

#ifdef PROXYATTN_X86_FAMILIES
#include <cpuid.h>
#endif

#include "cpu/simd/kernels.h"

namespace proxyattn::cpu {

#ifdef PROXYATTN_X86_FAMILIES
extern const Kernels kKernels_avx512;
extern const Kernels kKernels_avx2;
#endif
extern const Kernels kKernels_baseline;

namespace {

#ifdef PROXYATTN_X86_FAMILIES
// Older compilers don't know the name. That the system saves its registers goes with avx2.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

// A family runs where every instruction set is there that CMakeLists.txt builds it with.
std::vector<const Kernels*> find_supported() {
  std::vector<const Kernels*> found;
#ifdef PROXYATTN_X86_FAMILIES
  const bool has_fma_and_f16c = __builtin_cpu_supports("fma") && has_f16c();
  if (has_fma_and_f16c && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kKernels_avx512);
  }
  if (has_fma_and_f16c && __builtin_cpu_supports("avx2")) found.push_back(&kKernels_avx2);
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
