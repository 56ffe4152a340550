// The scout warp: takes items, tells the others of them and loads their queries.
//
// It works an item ahead where there are two query slots. The producer alone would hold up the keys
// while it asks for the number of an item and looks for its place.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/score/sm90/problem.h"
#include "cuda/score/sm90/scheduler.cuh"
#include "cuda/score/sm90/shared_storage.cuh"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class ScoreScout {
 public:
  PROXYATTN_DEVICE ScoreScout(const ScoreProblem& problem, ScoreStorage<Traits>& shared)
      : p_(problem),
        shared_(shared),
        queries_(shared.logits, problem.q_map),
        walk_(problem, shared.station) {}

  PROXYATTN_DEVICE void run() {
    int idx = blockIdx.x;
    while (walk_.advance_to(p_, idx)) {
      if (is_scored(idx)) {
        walk_.describe(p_, idx, item());
        if (leads_warp()) {
          announce();
          load_query(item());
        }
      }
      idx = next_item();
    }
    if (leads_warp()) {
      item().slot = kNoMoreItems;
      announce();
      queries_.skip();
    }
  }

 private:
  PROXYATTN_DEVICE bool is_scored(int idx) const {
    return walk_.end_block(p_, idx) > p_.first_scored_block(walk_.list(p_));
  }

  // Taken when there is a slot for it: who takes items early ends late.
  PROXYATTN_DEVICE int next_item() {
    int item = 0;
    if (leads_warp()) {
      queries_.wait_slot(ptx::WaitSite::kScoutQuery);
      item = atomicAdd(p_.next_item, 1) + static_cast<int>(gridDim.x);
    }
    return __shfl_sync(kAllLanes, item, 0);
  }

  PROXYATTN_DEVICE ScoreItem& item() const { return shared_.items[queries_.slot()]; }

  // The producer waits for this, consumers for the queries.
  PROXYATTN_DEVICE void announce() const {
    ptx::mbarrier_arrive(&shared_.announced[queries_.slot()]);
  }

  PROXYATTN_DEVICE void load_query(const ScoreItem& item) {
    queries_.load(item.batch,
                  [&](int i) { return make_int2(item.head, item.first_row + i * kGroupRows); });
  }

  const ScoreProblem& p_;
  ScoreStorage<Traits>& shared_;
  QueryLoader<Traits> queries_;
  ScoreWalk walk_;
};

}  // namespace proxyattn::cuda::sm90
