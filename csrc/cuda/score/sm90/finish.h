// The second of the family's kernels, shared by all instances of the first.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

inline constexpr const char* kScoreOp = "score_blocks";

// Makes the pass's cells of what score_kernel left in scratch. block_keys: sampled keys of a whole
// key block.
void finish_scores(const ScoreProblem& problem, int block_keys, Stream stream);

}  // namespace proxyattn::cuda::sm90
