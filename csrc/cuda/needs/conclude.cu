#include <limits>

#include "proxyattn/needs.h"

#include "common/block_grid.h"
#include "common/math.h"
#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"
#include "cuda/needs/count_blocks_kernel.cuh"
#include "cuda/needs/dispatch.h"
#include "cuda/needs/fill_kernel.cuh"
#include "cuda/needs/layout.h"
#include "cuda/needs/row_mass_kernels.cuh"
#include "cuda/needs/share_kernel.cuh"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {
namespace {

// The kernel for sequences of more than `too_few` key blocks.
template <int kItems>
void launch_count(const NeedParams& params,
                  const NeedLayout& layout,
                  int64_t too_few,
                  Stream stream) {
  const CountProblem problem{layout, params.budgets, static_cast<int>(too_few), params.gamma};
  LaunchShape shape{params.batch * params.q_heads};
  shape.threads = kCountThreads;
  shape.shared_bytes = sizeof(typename BlockCounter<kItems>::Shared);
  static_assert(sizeof(typename BlockCounter<kItems>::Shared) <= kPortableSharedBytes);
  launch<count_blocks_kernel<kItems>>("estimate_budgets", shape, stream, problem);
}

void count_blocks(const NeedParams& params, const NeedLayout& layout, Stream stream) {
  constexpr int64_t kFew = BlockCounter<2>::kCapacity;
  constexpr int64_t kMany = BlockCounter<8>::kCapacity;
  static_assert(BlockCounter<32>::kCapacity == kMaxCudaKvBlocks);
  // Sequences of a batch are all of one size, packed ones of any up to that.
  const int64_t most = ceil_div(params.kv_len, params.kv_block);
  const int64_t fewest = is_packed(params) ? 0 : most;
  if (fewest <= kFew) launch_count<2>(params, layout, -1, stream);
  if (fewest <= kMany && most > kFew) launch_count<8>(params, layout, kFew, stream);
  if (most > kMany) launch_count<32>(params, layout, kMany, stream);
}

void find_shares(const NeedParams& params, const NeedLayout& layout, Stream stream) {
  const BlockGrid grid{params.q_len,    params.kv_len, params.q_block, params.kv_block,
                       params.q_offset, params.causal, params.window};
  const ShareProblem problem{
      layout,
      params.shares,
      grid,
      params.num_sink_blocks,
      params.num_local_blocks,
      ForcedBlocks(grid, grid.last_queries(), params.num_sink_blocks, params.num_local_blocks)};
  LaunchShape shape{params.batch * params.q_heads};
  shape.threads = kShareThreads;
  launch<share_kernel>("estimate_shares", shape, stream, problem);
}

template <typename T>
void fill(const NeedParams& params, T* values, T value, Stream stream) {
  const int64_t count = params.batch * params.q_heads;
  LaunchShape shape{ceil_div<int64_t>(count, kFillThreads)};
  shape.threads = kFillThreads;
  launch<fill_kernel<T>>(needs_op(params), shape, stream, values, count, value);
}

}  // namespace

void launch_conclude(const NeedParams& params, Stream stream) {
  const char* op = needs_op(params);
  const NeedLayout layout(params);
  LaunchShape parts{layout.heads * layout.num_parts};
  parts.threads = kMassThreads;
  launch<part_lse_kernel>(op, parts, stream, layout);
  launch<block_mass_kernel>(op, parts, stream, layout);
  if (params.mode == BudgetMode::kLastBlock) {
    count_blocks(params, layout, stream);
  } else {
    find_shares(params, layout, stream);
  }
}

void launch_trivial(const NeedParams& params, int32_t budget, Stream stream) {
  if (params.mode == BudgetMode::kLastBlock && is_packed(params)) {
    const int64_t count = params.batch * params.q_heads;
    LaunchShape shape{ceil_div<int64_t>(count, kFillThreads)};
    shape.threads = kFillThreads;
    launch<fill_packed_kernel>(needs_op(params), shape, stream, NeedLayout(params), params.budgets,
                               count, budget);
  } else if (params.mode == BudgetMode::kLastBlock) {
    fill(params, params.budgets, budget, stream);
  } else {
    fill(params, params.shares, std::numeric_limits<float>::quiet_NaN(), stream);
  }
}

}  // namespace proxyattn::cuda
