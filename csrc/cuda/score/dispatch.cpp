// Picks the kernels of score_blocks: the newest family that the device can run and that takes the
// call's layout. Windows are for the portable one.
#include "cuda/score/dispatch.h"

#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "common/math.h"
#include "common/validate.h"
#include "cuda/common/family.h"
#include "cuda/common/limits.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "score_blocks";

struct Kernel : KernelKey {
  void (*launch)(const ScoreParams& params, Stream stream);
  bool (*fits)(const ScoreParams& params);  // null: takes every layout
  int64_t (*workspace_bytes)(const ScoreParams& params);
};

#ifdef PROXYATTN_HAS_SM90
template <int kHeadDim, DType kDType>
constexpr Kernel sm90_kernel() {
  return {{kSm90, kHeadDim, kDType, kNoWindows},
          sm90::launch_score<kHeadDim, kDType>,
          sm90::score_fits,
          sm90::score_workspace_bytes};
}
#endif

constexpr Kernel kKernels[] = {
#ifdef PROXYATTN_HAS_SM90
    sm90_kernel<64, DType::kBFloat16>(),
    sm90_kernel<64, DType::kFloat16>(),
    sm90_kernel<128, DType::kBFloat16>(),
    sm90_kernel<128, DType::kFloat16>(),
    sm90_kernel<256, DType::kBFloat16>(),
    sm90_kernel<256, DType::kFloat16>(),
#endif
    {{kSm80, kAnyHeadDim, {}}, sm80::launch_score, nullptr, sm80::score_workspace_bytes},
};

const Kernel& choose_kernel(const ScoreParams& p) {
  const FamilyChoice choice(kOp);
  if (const Kernel* kernel = find_kernel(kKernels, choice, p)) return *kernel;
  choice.refuse(kOp, describe_call(p));
}

}  // namespace

// Which family takes a call may hang on pointers that are not known yet, so this is what the
// neediest of them asks for.
int64_t score_blocks_workspace_bytes(const ScoreParams& params) {
  validate_score(params);
  const FamilyChoice choice(kOp);
  int64_t bytes = 0;
  for (const Kernel& kernel : kKernels) {
    if (!kernel.family.runs_on(choice.capability()) || !kernel.is_built_for(params)) continue;
    bytes = max_of(bytes, kernel.workspace_bytes(params));
  }
  return bytes;
}

void score_blocks(const ScoreParams& params, Stream stream) {
  validate_score(params);
  validate_prepared(kOp, params.packed);
  validate_alignment(kOp, params);
  check_dtype(kOp, params.dtype);
  check_head_dim(kOp, params.head_dim);
  const Kernel& kernel = choose_kernel(params);
  validate_workspace(kOp, params.workspace, params.workspace_bytes, kernel.workspace_bytes(params));
  if (params.batch == 0 || params.kv_len == 0) return;  // no cells
  kernel.launch(params, stream);
}

}  // namespace proxyattn::cuda
