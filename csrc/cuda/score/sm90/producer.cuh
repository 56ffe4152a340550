// The producer thread: takes items, tells the consumers of them and loads their tiles.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/score/sm90/problem.h"
#include "cuda/score/sm90/scheduler.cuh"
#include "cuda/score/sm90/shared_storage.cuh"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class ScoreProducer {
 public:
  PROXYATTN_DEVICE ScoreProducer(const ScoreProblem& problem, ScoreStorage<Traits>& shared)
      : p_(problem),
        shared_(shared),
        loader_(shared.logits, problem.q_map, problem.k_map),
        walk_(problem) {}

  PROXYATTN_DEVICE void run() {
    for (int idx = blockIdx.x; idx < p_.num_items;) {
      // Asked for early: the answer travels while this item's loads are issued.
      const int next = atomicAdd(p_.next_item, 1) + static_cast<int>(gridDim.x);
      walk_.advance_to(p_, idx);
      const ScoreItem item = walk_.item(p_, idx);
      const int unscored_rows = p_.first_scored_block(walk_.list()) * p_.block_rows;
      if ((item.row_tile + 1) * p_.tile_rows > unscored_rows) load(item);
      idx = next;
    }
    publish({kNoMoreItems, 0, 0, 0});
    loader_.skip_query();
  }

 private:
  PROXYATTN_DEVICE void load(const ScoreItem& item) {
    publish(item);
    const int batch = walk_.list() / p_.proxy_heads;
    const int head = walk_.list() - batch * p_.proxy_heads;
    const int first_row = p_.first_row + item.row_tile * p_.tile_rows;
    loader_.load_query(batch, [&](int i) { return make_int2(head, first_row + i * kGroupRows); });
    loader_.load_keys(batch, head, item.chunk * p_.chunk_tiles, item.num_tiles);
  }

  // The arrival on the query barrier that follows makes the item visible to the consumers.
  PROXYATTN_DEVICE void publish(const ScoreItem& item) {
    loader_.wait_query();
    shared_.items[loader_.query_slot()] = item;
  }

  const ScoreProblem& p_;
  ScoreStorage<Traits>& shared_;
  LogitLoader<Traits> loader_;
  ScoreWalk walk_;
};

}  // namespace proxyattn::cuda::sm90
