// Shared memory of a score thread block.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/score/sm90/scheduler.cuh"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
struct __align__(1024) ScoreStorage {
  LogitStorage<Traits> logits;
  ScoreItem items[Traits::kQueryStages];     // what the query slots hold
  ScoreStation station;                      // where the scout is
  uint64_t announced[Traits::kQueryStages];  // barriers: the item is there

  PROXYATTN_DEVICE void init() {
    logits.init();
    for (uint64_t& barrier : announced) ptx::mbarrier_init(&barrier, 1);
  }
};

}  // namespace proxyattn::cuda::sm90
