#include "proxyattn/needs.h"

#include "cuda/needs/count_blocks_kernel.cuh"
#include "cuda/needs/dispatch.h"
#include "cuda/needs/layout.h"
#include "cuda/needs/row_mass_kernels.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "estimate_budgets";

template <int kItems>
void launch_count(const CountProblem& problem, int64_t heads, Stream stream) {
  LaunchShape shape{heads};
  shape.threads = kCountThreads;
  shape.shared_bytes = sizeof(typename BlockCounter<kItems>::Shared);
  static_assert(sizeof(typename BlockCounter<kItems>::Shared) <= kPortableSharedBytes);
  launch<count_blocks_kernel<kItems>>(kOp, shape, stream, problem);
}

}  // namespace

void launch_count_blocks(const NeedParams& params, Stream stream) {
  const NeedLayout layout(params);
  LaunchShape parts{layout.heads * layout.num_parts};
  parts.threads = kMassThreads;
  launch<part_lse_kernel>(kOp, parts, stream, layout);
  launch<block_mass_kernel>(kOp, parts, stream, layout);

  const CountProblem problem{layout.mass, params.budgets, static_cast<int>(layout.num_kv_blocks),
                             params.gamma};
  if (layout.num_kv_blocks <= BlockCounter<2>::kCapacity) {
    launch_count<2>(problem, layout.heads, stream);
  } else if (layout.num_kv_blocks <= BlockCounter<8>::kCapacity) {
    launch_count<8>(problem, layout.heads, stream);
  } else {
    static_assert(BlockCounter<32>::kCapacity == kMaxCudaKvBlocks);
    launch_count<32>(problem, layout.heads, stream);
  }
}

void launch_fill_budgets(const NeedParams& params, int64_t budget, Stream stream) {
  const int64_t num_budgets = params.batch * params.q_heads;
  LaunchShape shape{ceil_div<int64_t>(num_budgets, kFillThreads)};
  shape.threads = kFillThreads;
  launch<fill_budgets_kernel>(kOp, shape, stream, params.budgets, num_budgets,
                              static_cast<int32_t>(budget));
}

}  // namespace proxyattn::cuda
