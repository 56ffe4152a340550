// The producer thread: loads the keys of the items that the scout announces.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/score/sm90/problem.h"
#include "cuda/score/sm90/scheduler.cuh"
#include "cuda/score/sm90/shared_storage.cuh"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
PROXYATTN_DEVICE void load_score_keys(const ScoreProblem& p, ScoreStorage<Traits>& shared) {
  KeyLoader<Traits> keys(shared.logits, p.keys);
  Ring<Traits::kQueryStages> ring;
  while (true) {
    ptx::mbarrier_wait(&shared.announced[ring.slot], ring.phase, ptx::WaitSite::kProducerOrder);
    // Consumers give the slot back when they have read these keys: nobody writes here before.
    const ScoreItem& item = shared.items[ring.slot];
    if (item.slot == kNoMoreItems) return;
    keys.load(item.batch, item.head / p.key_sharers,
              item.first_key_tile + (item.chunk << p.chunk_shift), item.num_tiles);
    ring.next();
  }
}

}  // namespace proxyattn::cuda::sm90
