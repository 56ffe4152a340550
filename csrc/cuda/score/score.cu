// The portable kernels of score_blocks: every device, every layout.
#include "proxyattn/score.h"

#include "cuda/common/launch.h"
#include "cuda/common/limits.h"
#include "cuda/score/dispatch.h"
#include "cuda/score/score_kernel.cuh"

namespace proxyattn::cuda::sm80 {
namespace {

constexpr const char* kOp = "score_blocks";

// Keys of a chunk: few enough that a call of one short sequence has work for every SM, many enough
// that the queries' passage through shared memory is small beside it. The bound keeps the subcells
// within the smallest device's shared memory.
constexpr int kMinChunkKeys = 512;
constexpr int kMaxChunkKeys = 1024;
constexpr int64_t kManyKeys = 16384;

// The number of partial sums a row is given up to, in the first pass.
constexpr int64_t kMaxLseChunks = 32;

int64_t num_sampled_rows(const ScoreParams& p) {
  const int64_t block_rows = p.q_block / p.stride;
  const int64_t end = min_of(ceil_div(p.q_len, p.stride), p.rows.end * block_rows);
  return max_of<int64_t>(0, end - p.rows.begin * block_rows);
}

// Both depend on the keys alone, so that a row's bits don't depend on the rows asked for.
int64_t cell_chunk_keys(int64_t num_keys) {
  return num_keys < kManyKeys ? kMinChunkKeys : kMaxChunkKeys;
}
int64_t lse_chunk_keys(int64_t num_keys) {
  return max_of(cell_chunk_keys(num_keys),
                round_up(ceil_div(num_keys, kMaxLseChunks), int64_t{kMinChunkKeys}));
}

ScoreProblem make_problem(const ScoreParams& p) {
  ScoreProblem s{};
  s.q = p.q_proxy;
  s.k = p.k_proxy;
  s.lse = static_cast<float*>(p.workspace);
  s.peak = p.peak;
  s.mass = p.mass;
  s.q_strides = p.q_proxy_strides;
  s.k_strides = p.k_proxy_strides;
  s.lists = p.batch * p.proxy_heads;
  s.proxy_heads = p.proxy_heads;
  s.key_sharers = p.proxy_heads / p.key_proxy_heads;
  s.q_offset = p.q_offset;
  s.block_rows = static_cast<int>(p.q_block / p.stride);
  s.block_keys = static_cast<int>(p.kv_block / p.stride);
  s.first_row = p.rows.begin * s.block_rows;
  s.num_rows = num_sampled_rows(p);
  s.num_row_tiles = ceil_div<int64_t>(s.num_rows, kScoreTileRows);
  s.num_q_blocks = p.rows.end - p.rows.begin;
  s.num_kv_blocks = ceil_div(p.kv_len, p.kv_block);
  s.stride = static_cast<int>(p.stride);
  s.num_keys = static_cast<int>(ceil_div(p.kv_len, p.stride));
  s.factor = p.scale * kLog2E;
  s.causal = p.causal;
  const TokenStrides& q = s.q_strides;
  const TokenStrides& k = s.k_strides;
  s.q_aligned = rows_are_aligned(s.q, q.batch, q.token, q.head);
  s.k_aligned = rows_are_aligned(s.k, k.batch, k.token, k.head);
  return s;
}

template <typename Traits>
LaunchShape tile_shape(const ScoreProblem& problem, int64_t num_chunks, int extra_bytes) {
  LaunchShape shape{problem.lists * num_chunks * problem.num_row_tiles};
  shape.threads = Traits::kThreads;
  shape.shared_bytes = Traits::kSharedBytes + extra_bytes;
  return shape;
}

template <typename Element, int kHeadDim>
void run(ScoreProblem problem, Stream stream) {
  using Traits = LogitTraits<Element, kHeadDim>;
  static_assert(Traits::kSharedBytes + 2 * subcell_floats(kMaxChunkKeys) * int{sizeof(float)} <=
                kPortableSharedBytes);
  const auto use_chunks = [&problem](int64_t chunk_keys) {
    problem.chunk_keys = static_cast<int>(chunk_keys);
    problem.num_chunks = static_cast<int>(ceil_div<int64_t>(problem.num_keys, chunk_keys));
  };
  use_chunks(lse_chunk_keys(problem.num_keys));
  problem.lse_pitch = problem.num_chunks * problem.num_rows;
  launch<row_lse_kernel<Element, kHeadDim>>(kOp, tile_shape<Traits>(problem, problem.num_chunks, 0),
                                            stream, problem);
  LaunchShape combine{ceil_div<int64_t>(problem.lists * problem.num_rows, kCombineThreads)};
  combine.threads = kCombineThreads;
  launch<combine_lse_kernel>(kOp, combine, stream, problem);

  use_chunks(cell_chunk_keys(problem.num_keys));
  const int subcell_bytes = subcell_floats(problem.chunk_keys) * int{sizeof(float)};
  if (problem.mass == nullptr) {
    launch<score_cells_kernel<Element, kHeadDim, false>>(
        kOp, tile_shape<Traits>(problem, problem.num_chunks, subcell_bytes), stream, problem);
  } else {
    launch<score_cells_kernel<Element, kHeadDim, true>>(
        kOp, tile_shape<Traits>(problem, problem.num_chunks, 2 * subcell_bytes), stream, problem);
  }
}

template <typename Element>
void run_head_dim(int64_t head_dim, const ScoreProblem& problem, Stream stream) {
  if (head_dim == 64) {
    run<Element, 64>(problem, stream);
  } else if (head_dim == 128) {
    run<Element, 128>(problem, stream);
  } else {
    run<Element, 256>(problem, stream);
  }
}

}  // namespace

int64_t score_workspace_bytes(const ScoreParams& params) {
  const int64_t num_keys = ceil_div(params.kv_len, params.stride);
  const int64_t chunks = ceil_div(num_keys, lse_chunk_keys(num_keys));
  return params.batch * params.proxy_heads * chunks * num_sampled_rows(params) *
         int64_t{sizeof(float)};
}

void launch_score(const ScoreParams& params, Stream stream) {
  const ScoreProblem problem = make_problem(params);
  if (params.dtype == DType::kBFloat16) {
    run_head_dim<__nv_bfloat16>(params.head_dim, problem, stream);
  } else {
    run_head_dim<__half>(params.head_dim, problem, stream);
  }
}

}  // namespace proxyattn::cuda::sm80
