// The portable kernels of score_blocks: every device, every layout.
#include "proxyattn/score.h"

#include "common/math.h"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"
#include "cuda/score/dispatch.h"
#include "cuda/score/problem.h"
#include "cuda/score/score_kernel.cuh"
#include "cuda/sequences/block_runs.h"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda::sm80 {
namespace {

constexpr const char* kOp = "score_blocks";

// Thread blocks that share the chunks of a row tile of packed sequences: as many as give short
// calls work for every SM.
constexpr int kPackedChunkStep = 8;

int64_t num_sampled_rows(const ScoreParams& p) {
  const int64_t block_rows = p.q_block / p.stride;
  const int64_t end = min_of(ceil_div(p.q_len, p.stride), p.rows.end * block_rows);
  return max_of<int64_t>(0, end - p.rows.begin * block_rows);
}

int num_sampled_keys(const ScoreParams& p) {
  return static_cast<int>(ceil_div(p.kv_len, p.stride));
}

// Chunks of the first pass, of packed sequences those that one of so many keys or fewer may have.
int64_t num_lse_chunks(const ScoreParams& p) {
  const int num_keys = num_sampled_keys(p);
  if (is_packed(p)) return min_of(kMaxLseChunks, ceil_div(num_keys, kMinChunkKeys));
  return ceil_div(num_keys, score_chunk_keys(ScorePass::kLse, num_keys));
}

// Rows that a chunk of the first pass has room for.
int64_t num_lse_rows(const ScoreParams& p) {
  if (!is_packed(p)) return num_sampled_rows(p);
  return max_packed_blocks(p.packed, p.batch, p.q_block) * (p.q_block / p.stride);
}

int64_t num_lists(const ScoreParams& p) {
  return is_packed(p) ? p.proxy_heads : p.batch * p.proxy_heads;
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
  s.lists = num_lists(p);
  s.proxy_heads = p.proxy_heads;
  s.key_sharers = p.proxy_heads / p.key_proxy_heads;
  s.lse_rows = num_lse_rows(p);
  s.lse_pitch = num_lse_chunks(p) * s.lse_rows;
  s.num_q_blocks = p.rows.end - p.rows.begin;
  s.num_kv_blocks = ceil_div(p.kv_len, p.kv_block);
  s.stride = static_cast<int>(p.stride);
  s.block_rows = static_cast<int>(p.q_block / p.stride);
  s.block_keys = static_cast<int>(p.kv_block / p.stride);
  s.entry.first_query = p.rows.begin * s.block_rows;
  s.entry.position = p.q_offset + p.rows.begin * p.q_block;
  s.entry.num_rows = num_sampled_rows(p);
  s.entry.num_q_blocks = s.num_q_blocks;
  s.entry.num_kv_blocks = s.num_kv_blocks;
  s.entry.num_keys = num_sampled_keys(p);
  const int tile_blocks = kScoreTileRows / s.block_rows;
  s.packed_tiles = {packed_table(p), tile_blocks};
  s.num_row_tiles =
      is_packed(p) ? QueryRuns::capacity(s.packed_tiles.table.max_q_blocks, tile_blocks, p.batch)
                   : ceil_div<int64_t>(s.entry.num_rows, kScoreTileRows);
  s.factor = p.scale * kLog2E;
  s.causal = p.causal;
  s.visibility = Visibility<int64_t>(p.causal, p.window);
  const TokenStrides& q = s.q_strides;
  const TokenStrides& k = s.k_strides;
  s.q_aligned = rows_are_aligned(s.q, q.batch, q.token, q.head);
  s.k_aligned = rows_are_aligned(s.k, k.batch, k.token, k.head);
  return s;
}

// What differs from pass to pass.
void set_pass(ScoreProblem& problem, ScorePass pass) {
  problem.pass = pass;
  problem.entry.chunk_keys = score_chunk_keys(pass, problem.entry.num_keys);
  problem.chunk_step = problem.entry.num_chunks();
  if (problem.is_packed()) {
    // Shorter sequences may have more chunks than the longest.
    problem.chunk_step = min_of(kPackedChunkStep, ceil_div(problem.entry.num_keys, kMinChunkKeys));
  }
}

template <typename Traits>
LaunchShape tile_shape(const ScoreProblem& problem, int extra_bytes) {
  LaunchShape shape{problem.lists * problem.chunk_step * problem.num_row_tiles};
  shape.threads = Traits::kThreads;
  shape.shared_bytes = Traits::kSharedBytes + extra_bytes;
  return shape;
}

template <typename Element, int kHeadDim, bool kPacked>
void find_lse(const ScoreProblem& problem, Stream stream) {
  const LaunchShape tiles = tile_shape<LogitTraits<Element, kHeadDim>>(problem, 0);
  if (problem.visibility.has_window()) {
    launch<row_lse_kernel<Element, kHeadDim, kPacked, true>>(kOp, tiles, stream, problem);
  } else {
    launch<row_lse_kernel<Element, kHeadDim, kPacked, false>>(kOp, tiles, stream, problem);
  }
  LaunchShape combine{ceil_div<int64_t>(problem.lists * problem.lse_rows, kCombineThreads)};
  combine.threads = kCombineThreads;
  launch<combine_lse_kernel>(kOp, combine, stream, problem);
}

template <typename Element, int kHeadDim, bool kPacked>
void run(ScoreProblem problem, Stream stream) {
  using Traits = LogitTraits<Element, kHeadDim>;
  static_assert(Traits::kSharedBytes + 2 * subcell_floats(kMaxChunkKeys) * int{sizeof(float)} <=
                kPortableSharedBytes);
  set_pass(problem, ScorePass::kLse);
  find_lse<Element, kHeadDim, kPacked>(problem, stream);

  set_pass(problem, ScorePass::kCells);
  // No sequence of fewer keys has longer chunks.
  const int subcell_bytes = subcell_floats(problem.entry.chunk_keys) * int{sizeof(float)};
  if (problem.mass == nullptr) {
    launch<score_cells_kernel<Element, kHeadDim, false, kPacked>>(
        kOp, tile_shape<Traits>(problem, subcell_bytes), stream, problem);
  } else {
    launch<score_cells_kernel<Element, kHeadDim, true, kPacked>>(
        kOp, tile_shape<Traits>(problem, 2 * subcell_bytes), stream, problem);
  }
}

template <typename Element, int kHeadDim>
void run(const ScoreProblem& problem, Stream stream) {
  if (problem.is_packed()) {
    run<Element, kHeadDim, true>(problem, stream);
  } else {
    run<Element, kHeadDim, false>(problem, stream);
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
  return num_lists(params) * num_lse_chunks(params) * num_lse_rows(params) * int64_t{sizeof(float)};
}

void launch_score(const ScoreParams& params, Stream stream) {
  if (params.batch == 0) return;
  const ScoreProblem problem = make_problem(params);
  if (params.dtype == DType::kBFloat16) {
    run_head_dim<__nv_bfloat16>(params.head_dim, problem, stream);
  } else {
    run_head_dim<__half>(params.head_dim, problem, stream);
  }
}

}  // namespace proxyattn::cuda::sm80
