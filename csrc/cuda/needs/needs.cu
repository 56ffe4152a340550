// The portable kernel that finds how the last queries spread: every device, every layout.
#include "proxyattn/needs.h"

#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/needs/block_lse_kernel.cuh"
#include "cuda/needs/dispatch.h"
#include "cuda/needs/layout.h"
#include "cuda/needs/problem.h"
#include "cuda/sequences/block_runs.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda::sm80 {
namespace {

// Keys of a chunk. Long ones save passages of the queries through shared memory, short ones give
// every SM work.
constexpr int kShortChunkKeys = 1024;
constexpr int kLongChunkKeys = 4096;
constexpr int64_t kManyKeys = 65536;

NeedProblem make_problem(const NeedParams& p) {
  NeedProblem s{};
  const NeedLayout layout(p);
  s.q = p.q;
  s.k = p.k;
  s.block_lse = layout.block_lse;
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.chunk_keys = p.kv_len < kManyKeys ? kShortChunkKeys : kLongChunkKeys;
  s.entry = NeedSource::of_entry(p);
  const int64_t chunk_blocks = s.chunk_keys / p.kv_block;
  s.packed_chunks = {packed_table(p), static_cast<int32_t>(chunk_blocks)};
  s.pages = PageTable(p.packed);
  s.batch = is_packed(p) ? 1 : p.batch;
  s.num_chunks =
      static_cast<int>(is_packed(p) ? KeyRuns::capacity(layout.num_kv_blocks, chunk_blocks, p.batch)
                                    : ceil_div<int64_t>(p.kv_len, s.chunk_keys));
  s.kv_heads = p.kv_heads;
  s.group_heads = p.q_heads / p.kv_heads;
  s.num_kv_blocks = layout.num_kv_blocks;
  s.q_block = static_cast<int>(p.q_block);
  s.kv_block = static_cast<int>(p.kv_block);
  s.factor = p.scale * kLog2E;
  s.visibility = Visibility<int64_t>(p.causal, p.window);
  s.q_aligned = rows_are_aligned(s.q, p.q_strides.batch, p.q_strides.token, p.q_strides.head);
  s.k_aligned = rows_are_aligned(s.k, p.k_strides.batch, p.k_strides.token, p.k_strides.head);
  return s;
}

template <typename Element, int kHeadDim>
void launch_kernel(const char* op, NeedProblem problem, Stream stream) {
  using Traits = LogitTraits<Element, kHeadDim>;
  problem.group_tiles =
      static_cast<int>(ceil_div<int64_t>(problem.group_heads * problem.q_block, Traits::kTileRows));
  LaunchShape shape{problem.batch * problem.num_chunks * problem.kv_heads * problem.group_tiles};
  shape.threads = Traits::kThreads;
  shape.shared_bytes = Traits::kSharedBytes;
  if (problem.pages.pages == nullptr) {
    launch<block_lse_kernel<Element, kHeadDim, false>>(op, shape, stream, problem);
  } else {
    launch<block_lse_kernel<Element, kHeadDim, true>>(op, shape, stream, problem);
  }
}

template <typename Element>
void launch_head_dim(const NeedParams& params, Stream stream) {
  const char* op = needs_op(params);
  const NeedProblem problem = make_problem(params);
  if (params.head_dim == 64) {
    launch_kernel<Element, 64>(op, problem, stream);
  } else if (params.head_dim == 128) {
    launch_kernel<Element, 128>(op, problem, stream);
  } else {
    launch_kernel<Element, 256>(op, problem, stream);
  }
}

}  // namespace

void launch_block_lse(const NeedParams& params, Stream stream) {
  if (params.dtype == DType::kBFloat16) {
    launch_head_dim<__nv_bfloat16>(params, stream);
  } else {
    launch_head_dim<__half>(params, stream);
  }
}

}  // namespace proxyattn::cuda::sm80
