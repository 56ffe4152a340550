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
      : p_(problem), shared_(shared), queries_(shared.logits, problem.q_map), walk_(problem) {}

  PROXYATTN_DEVICE void run() {
    int idx = blockIdx.x;
    while (walk_.advance_to(p_, idx)) {
      const ScoreItem item = walk_.item(p_, idx);
      if (is_scored(item) && leads_warp()) {
        announce(item);
        load_query(item);
      }
      idx = next_item();
    }
    if (leads_warp()) {
      announce({kNoMoreItems});
      queries_.skip();
    }
  }

 private:
  PROXYATTN_DEVICE bool is_scored(const ScoreItem& item) const {
    const int list = item.batch * p_.proxy_heads + item.head;
    return (item.row_tile + 1) * p_.tile_rows > p_.first_scored_block(list) * p_.block_rows;
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

  // The producer waits for this, consumers for the queries.
  PROXYATTN_DEVICE void announce(const ScoreItem& item) {
    shared_.items[queries_.slot()] = item;
    ptx::mbarrier_arrive(&shared_.announced[queries_.slot()]);
  }

  PROXYATTN_DEVICE void load_query(const ScoreItem& item) {
    const int first_row = p_.first_row + item.row_tile * p_.tile_rows;
    queries_.load(item.batch,
                  [&](int i) { return make_int2(item.head, first_row + i * kGroupRows); });
  }

  const ScoreProblem& p_;
  ScoreStorage<Traits>& shared_;
  QueryLoader<Traits> queries_;
  ScoreWalk walk_;
};

}  // namespace proxyattn::cuda::sm90
