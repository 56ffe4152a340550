// The producer warp: finds a thread block's items, tells the consumers of them and loads their
// queries and keys.
//
// Its lead lane talks to the barriers and to the copy engine. The whole warp looks for the
// sequences of items and for pages, of which each lane asks for what one load takes.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/needs/sm90/problem.h"
#include "cuda/needs/sm90/shared_storage.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

// The order of items, walked from the first on. Every thread block meets them in rising order, so a
// walk steps from sequence to sequence rather than search.
class NeedWalk {
 public:
  PROXYATTN_DEVICE explicit NeedWalk(const NeedItems& items) : items_(items) {
    if (items.is_packed()) {
      chunk_tiles_ = items.packed_chunk_tiles();
      num_items_ = items.num_packed_items(chunks());
    } else {
      num_items_ = items.num_entry_items();
    }
  }

  PROXYATTN_DEVICE int num_items() const { return num_items_; }

  // The whole warp calls, with rising numbers.
  PROXYATTN_DEVICE void advance_to(int idx) {
    if (!items_.is_packed()) return;
    const int chunk = items_.chunk_of_packed_item(idx);
    while (true) {
      const int next = sequence_ + warp_lane() + 1;
      const bool passed =
          next < items_.packed.count && chunks().first_run(items_.packed.sequences[next]) <= chunk;
      const int skipped = __popc(__ballot_sync(kAllLanes, passed));
      sequence_ += skipped;
      if (skipped < kWarpLanes) return;
    }
  }

  // That was advanced to.
  PROXYATTN_DEVICE NeedItem item(int idx) const {
    return items_.is_packed()
               ? items_.packed_item(chunks(), items_.packed.sequences[sequence_], idx)
               : items_.entry_item(idx);
  }

 private:
  PROXYATTN_DEVICE KeyRuns chunks() const { return items_.packed_chunks(chunk_tiles_); }

  const NeedItems& items_;
  int chunk_tiles_ = 0;
  int num_items_;
  int sequence_ = 0;
};

template <typename Traits>
class NeedProducer {
 public:
  PROXYATTN_DEVICE NeedProducer(const NeedProblem& problem, NeedStorage<Traits>& shared)
      : p_(problem),
        shared_(shared),
        queries_(shared.logits, problem.q_map),
        keys_(shared.logits, problem.keys),
        walk_(problem.items) {}

  PROXYATTN_DEVICE void run() {
    PROXYATTN_NO_UNROLL
    for (int idx = blockIdx.x; idx < walk_.num_items(); idx += gridDim.x) {
      walk_.advance_to(idx);
      // What is known of an item stays in shared memory: the warp has few registers.
      NeedItem& item = shared_.items[queries_.slot()];
      __syncwarp();  // nobody reads of the item before any more
      if (leads_warp()) {
        queries_.wait_slot(ptx::WaitSite::kProducerQuery);
        item = walk_.item(idx);
      }
      __syncwarp();  // the item is written
      if (item.num_tiles == 0) continue;
      load_query(item);
      load_keys(item);
    }
    __syncwarp();  // nobody reads of the last item any more
    if (!leads_warp()) return;
    queries_.wait_slot(ptx::WaitSite::kProducerQuery);
    shared_.items[queries_.slot()].num_tiles = 0;
    queries_.skip();
  }

 private:
  // Its arrival orders the item before the consumers' reads.
  PROXYATTN_DEVICE void load_query(const NeedItem& item) {
    if (!leads_warp()) return queries_.next();
    const NeedItems& items = p_.items;
    queries_.load(item.batch, [&](int i) {
      const NeedRows rows(items, item.row_tile * Traits::kGroups + i);
      // Behind the last head there is nothing to load, but the bytes must arrive.
      const int head = min(rows.head, items.group_heads - 1);
      return make_int2(item.kv_head * items.group_heads + head, item.first_query + rows.row);
    });
  }

  PROXYATTN_DEVICE void load_keys(const NeedItem& item) {
    const int end_tile = item.first_tile + item.num_tiles;
    PROXYATTN_NO_UNROLL
    for (int tile = item.first_tile; tile < end_tile; ++tile) {
      if (p_.items.in_pages) {
        load_pages(item, tile * kLogitKeys);
      } else if (leads_warp()) {
        load_following(item, tile);
      }
      keys_.next();
    }
  }

  PROXYATTN_DEVICE void load_following(const NeedItem& item, int tile) {
    keys_.open();
    const int token = item.first_key + tile * kLogitKeys;
    if (tile < item.num_whole) {
      const RunPlace place(token);
      keys_.load_whole(item.batch, item.kv_head, place.run, place.token);
    } else {
      keys_.load_in_order(item.batch, item.kv_head, token);
    }
  }

  // Of pages that there are not, and behind the last key, the copy engine has zeros.
  PROXYATTN_DEVICE void load_pages(const NeedItem& item, int first_key) {
    const int row = p_.page_loads.first_key(warp_lane(), Traits::kBoxes);
    const int key = first_key + row;
    const int page = row < kLogitKeys && key < item.num_keys ? p_.pages.page(item.sequence, key)
                                                             : PageTable::kNoPage;
    if (leads_warp()) keys_.open();
    __syncwarp();  // the slot is free and its bytes are announced
    if (row >= kLogitKeys) return;
    keys_.load_piece(row, PageLoads::box(warp_lane(), Traits::kBoxes), page, item.kv_head,
                     p_.pages.token_in_page(key));
  }

  const NeedProblem& p_;
  NeedStorage<Traits>& shared_;
  QueryLoader<Traits> queries_;
  KeyLoader<Traits> keys_;
  NeedWalk walk_;
};

}  // namespace proxyattn::cuda::sm90
