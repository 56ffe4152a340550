// Picks the kernels of estimate_needs: the newest family that the device can run and that takes
// the call's layout finds how the queries spread, the portable one inside windows, then portable
// kernels conclude.
#include "cuda/needs/dispatch.h"

#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "common/math.h"
#include "common/validate.h"
#include "cuda/common/family.h"
#include "cuda/common/limits.h"
#include "cuda/needs/layout.h"

namespace proxyattn::cuda {
namespace {

struct Kernel : KernelKey {
  void (*launch)(const NeedParams& params, Stream stream);
  bool (*fits)(const NeedParams& params);  // null: takes every layout
};

#ifdef PROXYATTN_HAS_SM90
template <int kHeadDim, DType kDType>
constexpr Kernel sm90_kernel() {
  return {{kSm90, kHeadDim, kDType, kNoWindows},
          sm90::launch_block_lse<kHeadDim, kDType>,
          sm90::block_lse_fits};
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
    {{kSm80, kAnyHeadDim, {}}, sm80::launch_block_lse, nullptr},
};

const Kernel& choose_kernel(const NeedParams& p) {
  const char* op = needs_op(p);
  const FamilyChoice choice(op);
  if (const Kernel* kernel = find_kernel(kKernels, choice, p)) return *kernel;
  choice.refuse(op, describe_call(p));
}

bool has_nothing(const NeedParams& p) {
  return p.batch == 0 || p.q_len == 0 || p.kv_len == 0;
}

// Whether the settings alone decide.
bool is_trivial(const NeedParams& p) {
  const bool asks = p.mode == BudgetMode::kTopP || (p.gamma > 0.0 && p.gamma < 1.0);
  return has_nothing(p) || !asks;
}

int32_t trivial_budget(const NeedParams& p) {
  if (has_nothing(p)) return 0;
  return p.gamma >= 1.0 ? static_cast<int32_t>(ceil_div(p.kv_len, p.kv_block)) : 1;
}

}  // namespace

int64_t estimate_needs_workspace_bytes(const NeedParams& params) {
  validate_needs(params);
  return is_trivial(params) ? 0 : NeedLayout(params).bytes();
}

void estimate_needs(const NeedParams& params, Stream stream) {
  validate_needs(params);
  const char* op = needs_op(params);
  validate_prepared(op, params.packed);
  validate_alignment(op, params);
  check_dtype(op, params.dtype);
  check_head_dim(op, params.head_dim);
  check_num_kv_blocks(op, ceil_div(params.kv_len, params.kv_block));
  validate_workspace(op, params.workspace, params.workspace_bytes,
                     estimate_needs_workspace_bytes(params));
  if (!is_trivial(params)) {
    choose_kernel(params).launch(params, stream);
    launch_conclude(params, stream);
  } else {
    launch_trivial(params, trivial_budget(params), stream);
  }
}

}  // namespace proxyattn::cuda
