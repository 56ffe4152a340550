#include "proxyattn/sequences.h"

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/common/launch.h"
#include "cuda/sequences/prepare_kernel.cuh"

namespace proxyattn::cuda {

void prepare_sequences(const SequenceParams& params, Stream stream) {
  PrepareProblem problem{};
  problem.packed = params.packed;
  problem.table = SequenceTable(params.table, params);
  problem.limits = sequence_limits(params.packed, params.max_q_len, params.max_kv_len);
  problem.max_total_kv =
      static_cast<int>(max_total_keys(params.packed, params.count, params.max_kv_len));
  problem.first_block = static_cast<int>(params.packed.blocks.begin);
  problem.end_block = problem.first_block + problem.table.max_q_blocks;
  problem.q_block = static_cast<int>(params.q_block);
  problem.kv_block = static_cast<int>(params.kv_block);
  problem.unit_tokens = static_cast<int>(params.stride * kWindowUnit);
  while (problem.limits.kv_len >> problem.key_bits > 0) ++problem.key_bits;
  LaunchShape shape{1};
  shape.threads = kPrepareThreads;
  launch<prepare_sequences_kernel>("prepare_sequences", shape, stream, problem);
}

}  // namespace proxyattn::cuda
