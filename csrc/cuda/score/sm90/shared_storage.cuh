// Shared memory of a score thread block.
#pragma once

#include "cuda/score/sm90/scheduler.cuh"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
struct __align__(1024) ScoreStorage {
  LogitStorage<Traits> logits;
  ScoreItem items[Traits::kQueryStages];  // what the query slots hold
};

}  // namespace proxyattn::cuda::sm90
