// The family's kernels beside the first, shared by all instances of that.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

inline constexpr const char* kScoreOp = "score_blocks";

// Packed sequences: fills slots [num_sequences + 1] and pass_tiles [num_passes + 1].
void find_slots(const ScoreProblem& problem,
                ScoreSlots* slots,
                int32_t* pass_tiles,
                int64_t num_passes,
                int64_t pass_slots,
                Stream stream);

// Makes the pass's cells of what score_kernel left in scratch. block_keys: sampled keys of a whole
// key block; max_tiles: row tiles that the pass may have.
void finish_scores(const ScoreProblem& problem, int block_keys, int64_t max_tiles, Stream stream);

}  // namespace proxyattn::cuda::sm90
