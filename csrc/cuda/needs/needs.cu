// The portable kernel that finds how the last queries spread: every device, every layout.
#include "proxyattn/needs.h"

#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/needs/block_lse_kernel.cuh"
#include "cuda/needs/dispatch.h"
#include "cuda/needs/layout.h"

namespace proxyattn::cuda::sm80 {
namespace {

// Keys of a chunk. Long ones save passages of the queries through shared memory, short ones give
// every SM work.
constexpr int kShortChunkKeys = 1024;
constexpr int kLongChunkKeys = 4096;
constexpr int64_t kManyKeys = 65536;

NeedProblem make_problem(const NeedParams& p) {
  NeedProblem s{};
  const int64_t rows = min_of(p.q_block, p.q_len);
  const int64_t first_query = p.q_len - rows;
  // 16-bit elements, whatever their format.
  s.q = static_cast<const uint16_t*>(p.q) + first_query * p.q_strides.token;
  s.k = p.k;
  s.block_lse = NeedLayout(p).block_lse;
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.batch = p.batch;
  s.kv_heads = p.kv_heads;
  s.group_heads = p.q_heads / p.kv_heads;
  s.position = p.q_offset + first_query;
  s.rows = static_cast<int>(rows);
  s.q_block = static_cast<int>(p.q_block);
  s.kv_block = static_cast<int>(p.kv_block);
  s.num_keys = static_cast<int>(p.kv_len);
  s.num_kv_blocks = static_cast<int>(ceil_div(p.kv_len, p.kv_block));
  s.chunk_keys = p.kv_len < kManyKeys ? kShortChunkKeys : kLongChunkKeys;
  s.num_chunks = ceil_div(s.num_keys, s.chunk_keys);
  s.factor = p.scale * kLog2E;
  s.causal = p.causal;
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
  launch<block_lse_kernel<Element, kHeadDim>>(op, shape, stream, problem);
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
