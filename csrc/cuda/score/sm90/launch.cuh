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

// What of the workspace the device fills before the first pass.
struct ScoreSlotsScratch {
  ScoreSlots* slots;
  int32_t* pass_tiles;
};

// Everything but what differs from pass to pass.
template <int kHeadDim>
ScoreProblem make_score_problem(const ScoreParams& s,
                                const ScorePlan& plan,
                                ScoreSlotsScratch& found) {
  ScoreProblem p{};
  constexpr int kBoxes = kHeadDim / kTensorBoxColumns;
  const int64_t batch = plan.is_packed() ? 1 : s.batch;
  p.q_map = make_tensor_map(kScoreOp, s.q_proxy, s.dtype,
                            {plan.num_queries(), s.head_dim, s.proxy_heads, batch},
                            s.q_proxy_strides, {kGroupRows, kBoxes});
  p.keys =
      make_key_maps(kScoreOp, s.k_proxy, s.dtype,
                    {plan.num_keys(), s.head_dim, s.key_proxy_heads, batch}, s.k_proxy_strides);
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
  found.slots = reinterpret_cast<ScoreSlots*>(take(plan.slots_bytes()));
  found.pass_tiles = reinterpret_cast<int32_t*>(take(plan.pass_tiles_bytes()));
  p.next_item = reinterpret_cast<int32_t*>(take(plan.counter_bytes()));
  if (plan.is_packed()) {
    const SequenceTable table(s.packed.table, sequence_params(s, s.stride));
    p.sequences = table.sequences;
    p.slots = found.slots;
    p.pass_tiles = found.pass_tiles;
  }
  p.span = plan.span();
  p.entry_slots = plan.slots();
  p.num_sequences = static_cast<int>(s.batch);
  p.proxy_heads = static_cast<int>(s.proxy_heads);
  p.key_sharers = static_cast<int>(s.proxy_heads / s.key_proxy_heads);
  p.chunk_shift = static_cast<int>(plan.chunk_shift());
  p.tile_rows = logit_tile_rows(kHeadDim);
  while (s.stride >> p.stride_shift > 1) ++p.stride_shift;
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
  p.pass_begin = static_cast<int>(pass.slots_begin);
  p.pass_end = static_cast<int>(pass.slots_end);
  p.tiles_begin = static_cast<int>(pass.tiles_begin);
  p.tiles_end = static_cast<int>(pass.tiles_end);
}

template <typename Traits, int kBlockKeys, bool kWithMass>
void launch_score_pass(const ScoreProblem& problem, const ScorePlan& plan, Stream stream) {
  LaunchShape shape{};
  shape.grid_x = min_of<int64_t>(device_attribute(kScoreOp, cudaDevAttrMultiProcessorCount),
                                 max_of<int64_t>(1, plan.max_slots()));
  shape.grid_y = shape.grid_z = 1;
  shape.threads = Traits::kThreads;
  shape.shared_bytes = sizeof(ScoreStorage<Traits>);
  launch<score_kernel<Traits, kBlockKeys, kWithMass>>(kScoreOp, shape, stream, problem);
  const int64_t tiles =
      plan.is_packed() ? plan.max_tiles() : problem.tiles_end - problem.tiles_begin;
  finish_scores(problem, kBlockKeys, tiles, stream);
}

template <typename Traits, int kBlockKeys>
void launch_score_passes(ScoreProblem problem, const ScorePlan& plan, Stream stream) {
  // Each pass counts its own items; a memset is a node of a captured graph like any other.
  PROXYATTN_CUDA_CALL(kScoreOp, cudaMemsetAsync(problem.next_item, 0,
                                                static_cast<size_t>(plan.counter_bytes()), stream));
  plan.for_each_pass([&](const ScorePass& pass) {
    set_pass(problem, pass);
    if (problem.mass == nullptr) {
      launch_score_pass<Traits, kBlockKeys, false>(problem, plan, stream);
    } else {
      launch_score_pass<Traits, kBlockKeys, true>(problem, plan, stream);
    }
    ++problem.next_item;
    if (plan.is_packed()) ++problem.pass_tiles;
  });
}

template <int kHeadDim, DType kDType>
void launch_score(const ScoreParams& params, Stream stream) {
  using Traits = LogitTraits<kHeadDim, kDType>;
  const ScorePlan plan(params);
  if (plan.max_tiles() == 0) return;
  ScoreSlotsScratch found;
  const ScoreProblem problem = make_score_problem<kHeadDim>(params, plan, found);
  if (plan.is_packed()) {
    find_slots(problem, found.slots, found.pass_tiles, plan.num_passes(), plan.pass_slots(),
               stream);
  }
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
