// Picks the kernel of block_sparse_attention: the newest family that the device can run and that
// takes the call's layout.
#include "cuda/attention/dispatch.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <cuda_runtime_api.h>

#include "proxyattn/attention.h"
#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "common/math.h"
#include "common/validate.h"
#include "cuda/common/check.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "block_sparse_attention";
// Forces a family, so that one can check another on the same device.
constexpr const char* kFamilyVariable = "PROXYATTN_FAMILY";
// Kernels number tokens with 32 bits, and look a few tiles past the last.
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max() - 1024;

struct Kernel {
  const char* family;
  // Compute capabilities, 10 * major + minor, that the family was built for.
  int min_capability;
  int max_capability;
  int64_t head_dim;
  DType dtype;
  void (*launch)(const AttentionParams& params, Stream stream);
  bool (*fits)(const AttentionParams& params);                // null: takes every layout
  int64_t (*workspace_bytes)(const AttentionParams& params);  // null: needs none
};

constexpr int kAnyNewer = std::numeric_limits<int>::max();

template <int kHeadDim, DType kDType>
constexpr Kernel sm80_kernel() {
  return {"sm80",  80,     kAnyNewer, kHeadDim, kDType, sm80::launch_attention<kHeadDim, kDType>,
          nullptr, nullptr};
}

#ifdef PROXYATTN_HAS_SM90
// Built from instructions of compute capability 9.0 that no other has.
template <int kHeadDim, DType kDType>
constexpr Kernel sm90_kernel() {
  return {"sm90",     90,
          90,         kHeadDim,
          kDType,     sm90::launch_attention<kHeadDim, kDType>,
          sm90::fits, sm90::workspace_bytes};
}
#endif

// Newest family first: the first row that matches is taken.
constexpr Kernel kKernels[] = {
#ifdef PROXYATTN_HAS_SM90
    sm90_kernel<64, DType::kBFloat16>(),  sm90_kernel<64, DType::kFloat16>(),
    sm90_kernel<128, DType::kBFloat16>(), sm90_kernel<128, DType::kFloat16>(),
    sm90_kernel<256, DType::kBFloat16>(), sm90_kernel<256, DType::kFloat16>(),
#endif
    sm80_kernel<64, DType::kBFloat16>(),  sm80_kernel<64, DType::kFloat16>(),
    sm80_kernel<128, DType::kBFloat16>(), sm80_kernel<128, DType::kFloat16>(),
    sm80_kernel<256, DType::kBFloat16>(), sm80_kernel<256, DType::kFloat16>(),
};

bool is_built_for(const Kernel& kernel, const AttentionParams& p) {
  return kernel.head_dim == p.head_dim && kernel.dtype == p.dtype;
}

bool runs_on(const Kernel& kernel, int capability) {
  return kernel.min_capability <= capability && capability <= kernel.max_capability;
}

int current_capability() {
  int device = 0;
  PROXYATTN_CUDA_CALL(kOp, cudaGetDevice(&device));
  return device_capability(device);
}

// "sm80 (head_dim 64, bfloat16), ..." of the kernels that the device can run.
std::string describe_kernels(int capability) {
  std::string text;
  for (const Kernel& kernel : kKernels) {
    if (!runs_on(kernel, capability)) continue;
    if (!text.empty()) text += ", ";
    text += join_message(kernel.family, " (head_dim ", kernel.head_dim, ", ",
                         dtype_name(kernel.dtype), ")");
  }
  return text.empty() ? "none" : text;
}

std::string describe_call(const AttentionParams& p, int capability) {
  return join_message("head_dim=", p.head_dim, ", dtype=", dtype_name(p.dtype),
                      ", compute capability ", capability / 10, ".", capability % 10);
}

// The name in PROXYATTN_FAMILY; null when the variable is unset or empty.
const char* forced_family() {
  const char* name = std::getenv(kFamilyVariable);
  if (name == nullptr || *name == '\0') return nullptr;
  std::string families;
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.family, name) == 0) return name;
    if (families.find(kernel.family) != std::string::npos) continue;
    families += (families.empty() ? "" : ", ") + std::string(kernel.family);
  }
  throw InvalidArgument(
      join_message(kOp, ": ", kFamilyVariable, " must be one of ", families, ", got ", name));
}

const Kernel& choose_kernel(const AttentionParams& p) {
  const int capability = current_capability();
  const char* family = forced_family();
  for (const Kernel& kernel : kKernels) {
    if (family != nullptr && std::strcmp(kernel.family, family) != 0) continue;
    if (!is_built_for(kernel, p) || !runs_on(kernel, capability)) continue;
    if (kernel.fits == nullptr || kernel.fits(p)) return kernel;
  }
  if (family != nullptr) {
    throw InvalidArgument(join_message(
        kOp, ": ", kFamilyVariable, " must name a family that takes this device and layout, got ",
        family, " with ", describe_call(p, capability)));
  }
  throw InvalidArgument(
      join_message(kOp, ": head_dim and dtype must be those of a kernel for this device: ",
                   describe_kernels(capability), ", got ", describe_call(p, capability)));
}

void check_token_numbers(const AttentionParams& p) {
  PROXYATTN_CHECK(p.kv_len <= kMaxTokens, kOp, ": kv_len must be at most ", kMaxTokens,
                  " on a GPU, got kv_len=", p.kv_len);
  PROXYATTN_CHECK(p.q_len <= kMaxTokens, kOp, ": q_len must be at most ", kMaxTokens,
                  " on a GPU, got q_len=", p.q_len);
  PROXYATTN_CHECK(-kMaxTokens <= p.q_offset && p.q_offset <= kMaxTokens - p.q_len, kOp,
                  ": q_offset + q_len must be at most ", kMaxTokens,
                  " on a GPU, got q_offset=", p.q_offset, ", q_len=", p.q_len);
}

}  // namespace

std::vector<KernelConfig> supported_configs() {
  std::vector<KernelConfig> configs;
  for (const Kernel& kernel : kKernels) {
    configs.push_back({"cuda", kernel.family, kernel.head_dim, kernel.dtype});
  }
  return configs;
}

// Which family takes a call may hang on pointers that are not known yet, so this is what the
// neediest of them asks for.
int64_t block_sparse_attention_workspace_bytes(const AttentionParams& params) {
  validate_attention(params);
  const int capability = current_capability();
  int64_t bytes = 0;
  for (const Kernel& kernel : kKernels) {
    if (kernel.workspace_bytes == nullptr) continue;
    if (!is_built_for(kernel, params) || !runs_on(kernel, capability)) continue;
    bytes = max_of(bytes, kernel.workspace_bytes(params));
  }
  return bytes;
}

void block_sparse_attention(const AttentionParams& params, Stream stream) {
  validate_attention(params);
  check_token_numbers(params);
  const Kernel& kernel = choose_kernel(params);
  validate_workspace(kOp, params.workspace, params.workspace_bytes,
                     kernel.workspace_bytes == nullptr ? 0 : kernel.workspace_bytes(params));
  kernel.launch(params, stream);
}

}  // namespace proxyattn::cuda
