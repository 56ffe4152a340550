// The products of the sm90 kernels that want logits: rings of query and key tiles in shared memory,
// the loads into them, and the consumers' loop over them.
//
// A consumer computes one product at a time and then consumes it: what keeps the tensor cores busy
// meanwhile are the products of the other warpgroups.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_traits.h"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
struct LogitStorage {
  uint8_t query[Traits::kQueryStages][Traits::kQueryTileBytes];
  uint8_t key[Traits::kKeyStages][Traits::kKeyTileBytes];
  RingBarriers<Traits::kQueryStages> query_barriers;
  RingBarriers<Traits::kKeyStages> key_barriers;

  PROXYATTN_DEVICE void init() {
    query_barriers.init(Traits::kConsumerWarps);
    key_barriers.init(Traits::kConsumerWarps);
  }
};

// Descriptor steps, in units of 16 bytes.
PROXYATTN_DEVICE constexpr uint32_t logit_step(int bytes) {
  return static_cast<uint32_t>(bytes) / ptx::kDescriptorUnit;
}

// S[64 x 128] = Q K^T. Along head_dim a box holds four steps of 32 bytes, then comes the next box.
// Issues only: the caller commits and waits.
template <typename Traits>
PROXYATTN_DEVICE void issue_logits(float (&s)[Traits::kLogits], uint64_t query, uint64_t key) {
  constexpr int kDepth = 16;  // of one wgmma
  constexpr int kStepsPerBox = kTensorBoxColumns / kDepth;
  constexpr int kStepBytes = Traits::kBoxRowBytes / kStepsPerBox;
  PROXYATTN_UNROLL
  for (int i = 0; i < Traits::kHeadDim / kDepth; ++i) {
    const int box = i / kStepsPerBox;
    const uint32_t inside = logit_step(i % kStepsPerBox * kStepBytes);
    ptx::Wgmma<typename Traits::Element, kLogitKeys>::ss(
        s, query + inside + logit_step(box * Traits::kQueryBoxBytes),
        ptx::move_descriptor(key, inside + logit_step(box * Traits::kKeyBoxBytes)), i != 0);
  }
}

// Fills the ring of query tiles; one thread.
template <typename Traits>
class QueryLoader {
 public:
  PROXYATTN_DEVICE QueryLoader(LogitStorage<Traits>& shared, const CUtensorMap& map)
      : shared_(shared), map_(map) {
    ring_.phase = 1;
  }

  PROXYATTN_DEVICE void wait_slot(ptx::WaitSite site) {
    ptx::mbarrier_wait(&shared_.query_barriers.empty[ring_.slot], ring_.phase, site);
  }

  PROXYATTN_DEVICE int slot() const { return ring_.slot; }

  // The row tile in the slot that wait_slot() waited for. place(group) names the head and first row
  // of each warpgroup's rows.
  template <typename Place>
  PROXYATTN_DEVICE void load(int batch, const Place& place) {
    uint64_t* full = &shared_.query_barriers.full[ring_.slot];
    ptx::mbarrier_arrive_expect(full, Traits::kQueryTileBytes);
    PROXYATTN_NO_UNROLL
    for (int i = 0; i < Traits::kGroups; ++i) {
      const int2 head_and_row = place(i);
      ptx::tma_load(shared_.query[ring_.slot] + i * Traits::kGroupBytes, &map_, full, 0,
                    head_and_row.y, 0, head_and_row.x, batch, ptx::kEvictNormal);
    }
    next();
  }

  // Passes a slot on without a tile in it.
  PROXYATTN_DEVICE void skip() {
    ptx::mbarrier_arrive(&shared_.query_barriers.full[ring_.slot]);
    next();
  }

  // For a thread that looks on while another one loads.
  PROXYATTN_DEVICE void next() { ring_.next(); }

 private:
  LogitStorage<Traits>& shared_;
  const CUtensorMap& map_;
  Ring<Traits::kQueryStages> ring_;
};

// Fills the ring of key tiles, laid as key_maps.h describes. One thread opens slots and loads; of
// pages any thread may load its boxes into a slot that is open.
template <typename Traits>
class KeyLoader {
 public:
  PROXYATTN_DEVICE KeyLoader(LogitStorage<Traits>& shared, const KeyMaps& maps)
      : shared_(shared), maps_(maps) {
    ring_.phase = 1;
  }

  // Key tiles of the tensor, one after another.
  PROXYATTN_DEVICE void load(int batch, int head, int first_tile, int num_tiles) {
    PROXYATTN_NO_UNROLL
    for (int tile = first_tile; tile < first_tile + num_tiles; ++tile) {
      open();
      if (tile < maps_.num_whole) {
        load_whole(batch, head, tile * kTileRuns, 0);
      } else {
        load_in_order(batch, head, tile * kLogitKeys);
      }
      next();
    }
  }

  // Waits for a slot and announces the bytes of its tile.
  PROXYATTN_DEVICE void open() {
    ptx::mbarrier_wait(&shared_.key_barriers.empty[ring_.slot], ring_.phase,
                       ptx::WaitSite::kProducerKey);
    ptx::mbarrier_arrive_expect(full(), Traits::kKeyTileBytes);
  }

  PROXYATTN_DEVICE void next() { ring_.next(); }

  // A tile that begins with this token of this run, all of whose keys there are.
  PROXYATTN_DEVICE void load_whole(int batch, int head, int run, int token) {
    PROXYATTN_NO_UNROLL
    for (int box = 0; box < Traits::kBoxes; ++box) {
      ptx::tma_load(shared_.key[ring_.slot] + box * Traits::kKeyBoxBytes, &maps_.whole, full(),
                    box * kTensorBoxColumns, run, token, head, batch, ptx::kEvictNormal);
    }
  }

  // A tile that begins with this token. Behind the tensor's last one it has zeros.
  PROXYATTN_DEVICE void load_in_order(int batch, int head, int token) {
    ptx::tma_load(shared_.key[ring_.slot], &maps_.in_order, full(), 0, token, 0, head, batch,
                  ptx::kEvictNormal);
  }

  // 64 columns of the keys from `row` of the tile on, as many as a load takes of a page.
  PROXYATTN_DEVICE void load_piece(int row, int box, int page, int head, int token) {
    ptx::tma_load(shared_.key[ring_.slot] + box * Traits::kKeyBoxBytes + row * Traits::kBoxRowBytes,
                  &maps_.in_order, full(), 0, token, box, head, page, ptx::kEvictNormal);
  }

 private:
  PROXYATTN_DEVICE uint64_t* full() const { return &shared_.key_barriers.full[ring_.slot]; }

  LogitStorage<Traits>& shared_;
  const KeyMaps& maps_;
  Ring<Traits::kKeyStages> ring_;
};

// A consumer warpgroup's side of the rings.
template <typename Traits>
class LogitStream {
 public:
  PROXYATTN_DEVICE LogitStream(LogitStorage<Traits>& shared, int group) : shared_(shared) {
    query_descriptor_ = ptx::matrix_descriptor(shared.query[0] + group * Traits::kGroupBytes, 0);
    key_descriptor_ = ptx::matrix_descriptor(shared.key[0], 0);
  }

  // Until the next row tile has been passed on.
  PROXYATTN_DEVICE void wait_query() {
    ptx::mbarrier_wait(&shared_.query_barriers.full[query_.slot], query_.phase,
                       ptx::WaitSite::kConsumerQuery);
  }

  PROXYATTN_DEVICE int query_slot() const { return query_.slot; }

  PROXYATTN_DEVICE void release_query() {
    release_slot(&shared_.query_barriers.empty[query_.slot]);
    query_.next();
  }

  // Calls consume(s, key tile) for each of num_tiles key tiles.
  template <typename Consume>
  PROXYATTN_DEVICE void for_each_tile(int first_tile, int num_tiles, Consume& consume) {
    const uint64_t query = query_descriptor_ + query_.slot * logit_step(Traits::kQueryTileBytes);
    PROXYATTN_NO_UNROLL
    for (int tile = first_tile; tile < first_tile + num_tiles; ++tile) {
      // Through a shuffle, so that the compiler knows it, and with it the descriptors, to be
      // uniform in a warp: otherwise it moves each to uniform registers between the products.
      const int slot = __shfl_sync(kAllLanes, key_.slot, 0);
      ptx::mbarrier_wait(&shared_.key_barriers.full[slot], key_.phase, ptx::WaitSite::kConsumerKey);
      float s[Traits::kLogits];
      ptx::pin(s);
      ptx::wgmma_fence();
      issue_logits<Traits>(
          s, query,
          ptx::move_descriptor(key_descriptor_, slot * logit_step(Traits::kKeyTileBytes)));
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      release_slot(&shared_.key_barriers.empty[slot]);
      key_.next();
      consume(s, tile);
    }
  }

 private:
  LogitStorage<Traits>& shared_;
  uint64_t query_descriptor_;
  uint64_t key_descriptor_;
  Ring<Traits::kQueryStages> query_;
  Ring<Traits::kKeyStages> key_;
};

}  // namespace proxyattn::cuda::sm90
