#include "proxyattn/budget.h"

#include "common/validate.h"
#include "cuda/budget/block_lse_kernel.cuh"
#include "cuda/budget/count_blocks_kernel.cuh"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "estimate_budgets";

// Keys of a chunk. Long ones save passages of the queries through shared memory, short ones give
// every SM work.
constexpr int kShortChunkKeys = 1024;
constexpr int kLongChunkKeys = 4096;
constexpr int64_t kManyKeys = 65536;

// Whether the settings alone decide the budgets.
bool is_trivial(const BudgetParams& p) {
  return p.q_len == 0 || p.kv_len == 0 || !(p.gamma > 0.0 && p.gamma < 1.0);
}

int64_t trivial_budget(const BudgetParams& p) {
  if (p.q_len == 0 || p.kv_len == 0) return 0;
  return p.gamma >= 1.0 ? ceil_div(p.kv_len, p.kv_block) : 1;
}

BudgetProblem make_problem(const BudgetParams& p) {
  BudgetProblem s{};
  const int64_t rows = min_of(p.q_block, p.q_len);
  const int64_t first_query = p.q_len - rows;
  // 16-bit elements, whatever their format.
  s.q = static_cast<const uint16_t*>(p.q) + first_query * p.q_strides.token;
  s.k = p.k;
  s.block_lse = static_cast<float*>(p.workspace);
  s.budgets = p.budgets;
  s.q_strides = p.q_strides;
  s.k_strides = p.k_strides;
  s.batch = p.batch;
  s.kv_heads = p.kv_heads;
  s.group_heads = p.q_heads / p.kv_heads;
  s.position = p.q_offset + first_query;
  s.gamma = p.gamma;
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
void launch_block_lse(BudgetProblem problem, Stream stream) {
  using Traits = LogitTraits<Element, kHeadDim>;
  problem.group_tiles =
      static_cast<int>(ceil_div<int64_t>(problem.group_heads * problem.q_block, Traits::kTileRows));
  LaunchShape shape{problem.batch * problem.num_chunks * problem.kv_heads * problem.group_tiles};
  shape.threads = Traits::kThreads;
  shape.shared_bytes = Traits::kSharedBytes;
  launch<block_lse_kernel<Element, kHeadDim>>(kOp, shape, stream, problem);
}

template <typename Element>
void launch_head_dim(int64_t head_dim, const BudgetProblem& problem, Stream stream) {
  if (head_dim == 64) {
    launch_block_lse<Element, 64>(problem, stream);
  } else if (head_dim == 128) {
    launch_block_lse<Element, 128>(problem, stream);
  } else {
    launch_block_lse<Element, 256>(problem, stream);
  }
}

template <int kItems>
void launch_count(const BudgetProblem& problem, Stream stream) {
  LaunchShape shape{problem.batch * problem.q_heads()};
  shape.threads = kCountThreads;
  shape.shared_bytes = sizeof(typename BudgetCounter<kItems>::Shared);
  static_assert(sizeof(typename BudgetCounter<kItems>::Shared) <= kPortableSharedBytes);
  launch<count_blocks_kernel<kItems>>(kOp, shape, stream, problem);
}

void launch_count_blocks(const BudgetProblem& problem, Stream stream) {
  constexpr int64_t kThreads = kCountThreads;
  if (problem.num_kv_blocks <= 2 * kThreads) {
    launch_count<2>(problem, stream);
  } else if (problem.num_kv_blocks <= 8 * kThreads) {
    launch_count<8>(problem, stream);
  } else {
    static_assert(BudgetCounter<32>::kCapacity == kMaxCudaKvBlocks);
    launch_count<32>(problem, stream);
  }
}

}  // namespace

int64_t estimate_budgets_workspace_bytes(const BudgetParams& params) {
  validate_budget(params);
  if (is_trivial(params)) return 0;
  return params.batch * params.q_heads * ceil_div(params.kv_len, params.kv_block) * params.q_block *
         int64_t{sizeof(float)};
}

void estimate_budgets(const BudgetParams& params, Stream stream) {
  validate_budget(params);
  check_dtype(kOp, params.dtype);
  check_num_kv_blocks(kOp, ceil_div(params.kv_len, params.kv_block));
  validate_workspace(kOp, params.workspace, params.workspace_bytes,
                     estimate_budgets_workspace_bytes(params));
  if (is_trivial(params)) {
    const int64_t num_budgets = params.batch * params.q_heads;
    LaunchShape shape{ceil_div<int64_t>(num_budgets, kFillThreads)};
    shape.threads = kFillThreads;
    launch<fill_budgets_kernel>(kOp, shape, stream, params.budgets, num_budgets,
                                static_cast<int32_t>(trivial_budget(params)));
    return;
  }
  const BudgetProblem problem = make_problem(params);
  if (params.dtype == DType::kBFloat16) {
    launch_head_dim<__nv_bfloat16>(params.head_dim, problem, stream);
  } else {
    launch_head_dim<__half>(params.head_dim, problem, stream);
  }
  launch_count_blocks(problem, stream);
}

}  // namespace proxyattn::cuda
