// Host side of the family: tensor maps, scratch, passes and launches.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

#include "proxyattn/score.h"

#include "cuda/common/launch.h"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/score/dispatch.h"
#include "cuda/score/sm90/finish.h"
#include "cuda/score/sm90/kernel.cuh"
#include "cuda/score/sm90/plan.h"

namespace proxyattn::cuda::sm90 {

// Everything but what differs from pass to pass.
template <int kHeadDim>
ScoreProblem make_score_problem(const ScoreParams& s, const ScorePlan& plan) {
  ScoreProblem p{};
  constexpr int kBoxes = kHeadDim / kTensorBoxColumns;
  p.q_map = make_tensor_map(kScoreOp, s.q_proxy, s.dtype,
                            {ceil_div(s.q_len, s.stride), s.head_dim, s.proxy_heads, s.batch},
                            s.q_proxy_strides, {kGroupRows, kBoxes});
  p.keys =
      make_key_maps(kScoreOp, s.k_proxy, s.dtype,
                    {plan.num_keys(), s.head_dim, s.key_proxy_heads, s.batch}, s.k_proxy_strides);
  p.peak = s.peak;
  p.mass = s.mass;
  auto* scratch = static_cast<std::byte*>(s.workspace);
  const auto take = [&scratch](int64_t bytes) {
    std::byte* taken = scratch;
    scratch += bytes;
    return taken;
  };
  p.block_max = reinterpret_cast<float*>(take(plan.block_bytes()));
  if (s.mass != nullptr) p.block_lse = reinterpret_cast<float*>(take(plan.block_bytes()));
  p.stretch_lse = reinterpret_cast<float*>(take(plan.lse_bytes()));
  p.next_item = reinterpret_cast<int32_t*>(take(plan.counter_bytes()));
  p.proxy_heads = static_cast<int>(s.proxy_heads);
  p.key_sharers = static_cast<int>(s.proxy_heads / s.key_proxy_heads);
  p.chunk_shift = static_cast<int>(plan.chunk_shift());
  p.first_row = static_cast<int>(plan.first_row());
  p.num_rows = static_cast<int>(plan.num_rows());
  p.tile_rows = logit_tile_rows(kHeadDim);
  p.num_keys = static_cast<int>(plan.num_keys());
  p.first_limit = static_cast<int>(plan.first_limit());
  p.budgets = s.budgets;
  p.heads_per_list = s.budgets == nullptr ? 0 : static_cast<int>(s.q_heads / s.proxy_heads);
  p.offset_units = static_cast<int>(ceil_div(max_of<int64_t>(s.q_offset, 0), kBlockUnit));
  p.kv_block_units = static_cast<int>(s.kv_block / kBlockUnit);
  p.q_block_shift = s.q_block == kBlockUnit ? 0 : 1;
  p.first_q_block = static_cast<int>(s.rows.begin);
  p.num_q_blocks = static_cast<int>(s.rows.end - s.rows.begin);
  p.num_kv_blocks = static_cast<int>(ceil_div(s.kv_len, s.kv_block));
  p.block_rows = static_cast<int>(s.q_block / s.stride);
  p.causal = s.causal ? 1 : 0;
  p.factor = s.scale * kLog2E;
  return p;
}

inline void set_pass(ScoreProblem& p, const ScorePass& pass) {
  p.first_list = static_cast<int>(pass.first_list);
  p.num_lists = static_cast<int>(pass.num_lists);
  p.first_row_tile = static_cast<int>(pass.begin);
  p.num_row_tiles = static_cast<int>(pass.end - pass.begin);
  p.num_list_slots = static_cast<int>(pass.list_slots);
}

template <typename Traits, int kBlockKeys, bool kWithMass>
void launch_score_pass(const ScoreProblem& problem, Stream stream) {
  LaunchShape shape{};
  shape.grid_x = min_of<int64_t>(device_attribute(kScoreOp, cudaDevAttrMultiProcessorCount),
                                 int64_t{problem.num_lists} * problem.num_list_slots);
  shape.grid_y = shape.grid_z = 1;
  shape.threads = Traits::kThreads;
  shape.shared_bytes = sizeof(ScoreStorage<Traits>);
  launch<score_kernel<Traits, kBlockKeys, kWithMass>>(kScoreOp, shape, stream, problem);
  finish_scores(problem, kBlockKeys, stream);
}

template <typename Traits, int kBlockKeys>
void launch_score_passes(ScoreProblem problem, const ScorePlan& plan, Stream stream) {
  // Each pass counts its own items; a memset is a node of a captured graph like any other.
  PROXYATTN_CUDA_CALL(kScoreOp, cudaMemsetAsync(problem.next_item, 0,
                                                static_cast<size_t>(plan.counter_bytes()), stream));
  plan.for_each_pass([&](const ScorePass& pass) {
    set_pass(problem, pass);
    if (problem.mass == nullptr) {
      launch_score_pass<Traits, kBlockKeys, false>(problem, stream);
    } else {
      launch_score_pass<Traits, kBlockKeys, true>(problem, stream);
    }
    ++problem.next_item;
  });
}

template <int kHeadDim, DType kDType>
void launch_score(const ScoreParams& params, Stream stream) {
  using Traits = LogitTraits<kHeadDim, kDType>;
  const ScorePlan plan(params);
  if (plan.counter_bytes() == 0) return;  // no pass
  const ScoreProblem problem = make_score_problem<kHeadDim>(params, plan);
  const int64_t block_keys = params.kv_block / params.stride;
  if (block_keys == 16) {
    launch_score_passes<Traits, 16>(problem, plan, stream);
  } else if (block_keys == 32) {
    launch_score_passes<Traits, 32>(problem, plan, stream);
  } else if (block_keys == 64) {
    launch_score_passes<Traits, 64>(problem, plan, stream);
  } else {
    launch_score_passes<Traits, 128>(problem, plan, stream);
  }
}

}  // namespace proxyattn::cuda::sm90
