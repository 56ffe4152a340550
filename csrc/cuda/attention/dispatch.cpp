// Picks the kernel of block_sparse_attention: the newest family that the device can run and that
// takes the call's layout.
#include "cuda/attention/dispatch.h"

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "proxyattn/attention.h"
#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "common/math.h"
#include "common/sequence.h"
#include "common/validate.h"
#include "cuda/common/family.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "block_sparse_attention";
constexpr int64_t kTableAlignment = 16;
// Kernels number tokens with 32 bits, and look a few tiles past the last.
constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max() - 1024;

struct Kernel : KernelKey {
  void (*launch)(const AttentionParams& params, Stream stream);
  bool (*fits)(const AttentionParams& params);                // null: takes every layout
  int64_t (*workspace_bytes)(const AttentionParams& params);  // null: needs none
};

template <int kHeadDim, DType kDType>
constexpr Kernel sm80_kernel() {
  return {{kSm80, kHeadDim, kDType}, sm80::launch_attention<kHeadDim, kDType>, nullptr, nullptr};
}

#ifdef PROXYATTN_HAS_SM90
template <int kHeadDim, DType kDType>
constexpr Kernel sm90_kernel() {
  return {{kSm90, kHeadDim, kDType},
          sm90::launch_attention<kHeadDim, kDType>,
          sm90::fits,
          sm90::workspace_bytes};
}
#endif

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

// "sm80 (head_dim 64, bfloat16), ..." of the kernels that the device can run.
std::string describe_kernels(int capability) {
  std::string text;
  for (const Kernel& kernel : kKernels) {
    if (!kernel.family.runs_on(capability)) continue;
    if (!text.empty()) text += ", ";
    text += join_message(kernel.family.name, " (head_dim ", kernel.head_dim, ", ",
                         dtype_name(kernel.dtype), ")");
  }
  return text.empty() ? "none" : text;
}

const Kernel& choose_kernel(const AttentionParams& p) {
  const FamilyChoice choice(kOp);
  if (const Kernel* kernel = find_kernel(kKernels, choice, p)) return *kernel;
  if (choice.forced() != nullptr) choice.refuse(kOp, describe_call(p));
  throw InvalidArgument(join_message(
      kOp, ": head_dim and dtype must be those of a kernel for this device: ",
      describe_kernels(choice.capability()), ", got ", describe_call(p), ", compute capability ",
      choice.capability() / 10, ".", choice.capability() % 10));
}

// Attention reads no proxies.
constexpr int64_t kNoStride = 1;

// Of packed sequences that nobody has prepared yet.
int64_t table_bytes(const AttentionParams& p) {
  const bool prepared = p.packed.q_starts == nullptr || p.packed.table != nullptr;
  return prepared ? 0 : sequence_table_bytes(sequence_params(p, kNoStride));
}

void check_token_numbers(const AttentionParams& p) {
  PROXYATTN_CHECK(p.kv_len <= kMaxTokens, kOp, ": kv_len must be at most ", kMaxTokens,
                  " on a GPU, got kv_len=", p.kv_len);
  PROXYATTN_CHECK(p.q_len <= kMaxTokens, kOp, ": q_len must be at most ", kMaxTokens,
                  " on a GPU, got q_len=", p.q_len);
  if (p.packed.q_starts != nullptr) return;
  PROXYATTN_CHECK(-kMaxTokens <= p.q_offset && p.q_offset <= kMaxTokens - p.q_len, kOp,
                  ": q_offset + q_len must be at most ", kMaxTokens,
                  " on a GPU, got q_offset=", p.q_offset, ", q_len=", p.q_len);
}

}  // namespace

std::vector<KernelConfig> supported_configs() {
  std::vector<KernelConfig> configs;
  for (const Kernel& kernel : kKernels) {
    configs.push_back({"cuda", kernel.family.name, kernel.head_dim, kernel.dtype});
  }
  return configs;
}

// Which family takes a call may hang on pointers that are not known yet, so this is what the
// neediest of them asks for.
int64_t block_sparse_attention_workspace_bytes(const AttentionParams& params) {
  validate_attention(params);
  const FamilyChoice choice(kOp);
  int64_t bytes = 0;
  for (const Kernel& kernel : kKernels) {
    if (kernel.workspace_bytes == nullptr) continue;
    if (!kernel.is_built_for(params) || !kernel.family.runs_on(choice.capability())) continue;
    bytes = max_of(bytes, kernel.workspace_bytes(params));
  }
  return round_up(bytes, kTableAlignment) + table_bytes(params);
}

void block_sparse_attention(const AttentionParams& params, Stream stream) {
  validate_attention(params);
  validate_alignment(kOp, params);
  check_token_numbers(params);
  const Kernel& kernel = choose_kernel(params);
  validate_workspace(kOp, params.workspace, params.workspace_bytes,
                     block_sparse_attention_workspace_bytes(params));
  if (table_bytes(params) == 0) return kernel.launch(params, stream);
  // Behind what kernels keep.
  AttentionParams prepared = params;
  prepared.workspace_bytes = block_sparse_attention_workspace_bytes(params) - table_bytes(params);
  SequenceParams sequences = sequence_params(params, kNoStride);
  sequences.table = static_cast<std::byte*>(params.workspace) + prepared.workspace_bytes;
  prepare_sequences(sequences, stream);
  prepared.packed.table = sequences.table;
  prepared.packed.table_stride = kNoStride;
  kernel.launch(prepared, stream);
}

}  // namespace proxyattn::cuda
