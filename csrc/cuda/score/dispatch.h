// What each kernel family offers to score_blocks, in terms the host compiler understands. The
// parameters have been validated.
#pragma once

#include <cstdint>

#include "proxyattn/score.h"
#include "proxyattn/types.h"

namespace proxyattn::cuda::sm80 {

void launch_score(const ScoreParams& params, Stream stream);
int64_t score_workspace_bytes(const ScoreParams& params);

}  // namespace proxyattn::cuda::sm80

namespace proxyattn::cuda::sm90 {

// Defined, one instance a file, by the family's hdim<head_dim>_<dtype>.cu.
template <int kHeadDim, DType kDType>
void launch_score(const ScoreParams& params, Stream stream);

// True if the copy engine can address the call's tensors.
bool score_fits(const ScoreParams& params);
int64_t score_workspace_bytes(const ScoreParams& params);

}  // namespace proxyattn::cuda::sm90
