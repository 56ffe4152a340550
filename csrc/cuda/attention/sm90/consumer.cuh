// A consumer warpgroup: 64 query rows, all key tiles of the list, softmax in registers.
//
// Step j issues S_j = Q K_j^T and, behind it, O += P_{j-1} V_{j-1}. With two sets of probabilities
// the softmax of S_j runs while the second product is still under way; with one it waits for it.
// Either way the other warpgroup's products keep the tensor cores busy meanwhile. Both products are
// drained before the next step: an accumulator in flight across the loop's back edge would make
// ptxas serialise them.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/epilogue.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/products.cuh"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/attention/sm90/softmax.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
class Consumer {
  using Element = typename Traits::Element;

 public:
  PROXYATTN_DEVICE Consumer(const Problem& problem, SharedStorage<Traits>& shared, int warpgroup)
      : p_(problem), shared_(shared) {
    place_.thread = threadIdx.x & 127;
    place_.group = warpgroup % 2;
    place_.first_row = place_.group * kWarpgroupRows % Traits::kBlockRows;
    place_.barrier = kFirstEpilogueBarrier + warpgroup;
    query_descriptor_ =
        ptx::matrix_descriptor(shared.query[0] + Traits::group_bytes(place_.group), 0);
    key_descriptor_ = ptx::matrix_descriptor(shared.key[0], 0);
    value_descriptor_ = ptx::matrix_descriptor(shared.value[0], Traits::kPartBoxBytes);
  }

  PROXYATTN_DEVICE void run() {
    while (true) {
      ptx::mbarrier_wait(&shared_.query_barriers.full[query_.slot], query_.phase,
                         ptx::WaitSite::kConsumerQuery);
      const TileInfo tile = read_tile_info<Traits>(shared_.tiles[query_.slot][place_.group]);
      if (tile.steps == kNoMoreTiles) break;
      if (tile.steps > 0) {
        attend(tile);
      } else {
        pass(tile);
      }
      skip_keys(tile.skip);
      query_.next();
    }
    // Shared memory must outlive the copy engine's reads, and stores must land before exit.
    if (place_.thread == 0) ptx::tma_store_wait();
  }

 private:
  using Scores = float[Traits::kScores];
  using Outputs = float[Traits::kOutputs];
  using Probabilities = uint32_t[Traits::kProbabilities];

  PROXYATTN_DEVICE void attend(const TileInfo& tile) {
    // Every row of the warpgroup sees parts [0, whole_parts) whole, but for those that are marked.
    const int whole_parts = keys().end(place_.first_row) / Traits::kPartRows;
    // Key tiles before the last one, if only a part of that is this head's.
    const int uncut = Traits::kParts > 1 ? tile.steps - tile.odd : tile.steps;
    const uint64_t query =
        query_descriptor_ + query_.slot * descriptor_step(Traits::kQueryTileBytes);
    Scores s;
    Outputs o;
    Probabilities even, odd;
    RowState state;
    first_step(query, whole_parts, 0 >= uncut, state, s, o, even);
    if constexpr (Traits::kOverlap == Overlap::kOutput) {
      PROXYATTN_NO_UNROLL
      for (int j = 1; j < tile.steps; j += 2) {
        step(query, whole_parts, j >= uncut, state, s, o, even, odd);
        if (j + 1 == tile.steps) {
          copy(even, odd);
          break;
        }
        step(query, whole_parts, j + 1 >= uncut, state, s, o, odd, even);
      }
    } else {
      PROXYATTN_NO_UNROLL
      for (int j = 1; j < tile.steps; ++j) {
        step(query, whole_parts, j >= uncut, state, s, o, even, even);
      }
    }
    if (Traits::kParts > 1 && tile.odd) {
      // Values that the head did not choose, or that nobody loaded, must not meet zeros.
      last_step<Traits::kPartRows>(o, even);
    } else {
      last_step<Traits::kKeyRows>(o, even);
    }

    sum_rows(state);
    if (p_.sink_logits != nullptr) join_sink(o, state, sink_logit(p_, tile) * kLog2E);
    normalise(o, state);
    stage_output<Traits>(shared_.query[query_.slot], o, place_);
    const int num_rows = count_rows();
    store_lse(p_, tile, place_, num_rows, state);
    store_output(p_, shared_, tile, place_, num_rows, query_.slot);
    stored_ = &shared_.query_barriers.empty[query_.slot];
    // With a single slot the scout waits for it.
    if constexpr (Traits::kQueryStages == 1) release_stored();
  }

  // A tile without a key, or none of this warpgroup's.
  PROXYATTN_DEVICE void pass(const TileInfo& tile) {
    release_stored();
    if (tile.head != kNoHead) {
      store_nothing(p_, shared_, tile, place_, count_rows(), query_.slot);
    } else {
      release_slot(&shared_.query_barriers.empty[query_.slot]);
    }
  }

  // Past key tiles that only the other warpgroup reads.
  PROXYATTN_DEVICE void skip_keys(int tiles) {
    if constexpr (Traits::kHeads > 1) {
      PROXYATTN_NO_UNROLL
      for (int i = 0; i < tiles; ++i) {
        wait_key();
        release_key();
        wait_value();
        release_value();
      }
    }
  }

  // Gives back the query slot that the last store read from. Where there is another, this can wait
  // until there is a product to run beside.
  PROXYATTN_DEVICE void release_stored() {
    if (stored_ == nullptr) return;
    finish_store(place_, stored_);
    stored_ = nullptr;
  }

  // Scores of the first tile alone, which set the rows' references. Of a cut tile only the first
  // part is the head's.
  PROXYATTN_DEVICE void first_step(uint64_t query,
                                   int whole_parts,
                                   bool cut,
                                   RowState& state,
                                   Scores& s,
                                   Outputs& o,
                                   Probabilities& next) {
    TileParts<Traits> parts;
    wait_key(parts, cut);
    ptx::pin(s);
    ptx::wgmma_fence();
    issue_scores<Traits>(s, query, key());
    ptx::wgmma_commit();
    release_stored();
    ptx::wgmma_wait<0>();
    ptx::pin(s);
    mask_and_release_key(s, whole_parts, parts);
    const bool fits[2] = {false, false};
    float rescale[2];
    state.reset();
    softmax_rebase<Element>(s, state, p_.scale_log2, next, fits, rescale);
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kOutputs; ++i) o[i] = 0.0f;
  }

  // Scores of one tile, output of the one before, whose probabilities are `now`; fills `next`.
  PROXYATTN_DEVICE void step(uint64_t query,
                             int whole_parts,
                             bool cut,
                             RowState& state,
                             Scores& s,
                             Outputs& o,
                             Probabilities& now,
                             Probabilities& next) {
    TileParts<Traits> parts;
    wait_key(parts, cut);
    ptx::pin(s);
    ptx::pin(o);
    ptx::pin(now);
    ptx::wgmma_fence();
    issue_scores<Traits>(s, query, key());
    ptx::wgmma_commit();
    wait_value();
    ptx::wgmma_fence();
    issue_output<Traits>(o, now, value());
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::pin(s);
    mask_and_release_key(s, whole_parts, parts);
    if constexpr (Traits::kOverlap != Overlap::kOutput) drain_output(o, now);
    bool fits[2];
    float rescale[2];
    const bool in_range = softmax_step<Element>(s, state, p_.scale_log2, next, fits);
    if (!in_range) softmax_rebase<Element>(s, state, p_.scale_log2, next, fits, rescale);
    if constexpr (Traits::kOverlap == Overlap::kOutput) drain_output(o, now);
    if (!in_range) rescale_output(o, rescale);
  }

  template <int kKeys>
  PROXYATTN_DEVICE void last_step(Outputs& o, Probabilities& now) {
    wait_value();
    ptx::pin(o);
    ptx::pin(now);
    ptx::wgmma_fence();
    issue_output<Traits, kKeys>(o, now, value());
    ptx::wgmma_commit();
    drain_output(o, now);
  }

  // The output product is done: its registers and its value slot are free.
  PROXYATTN_DEVICE void drain_output(Outputs& o, Probabilities& now) {
    ptx::wgmma_wait<0>();
    ptx::pin(o);
    ptx::pin(now);
    release_value();
  }

  PROXYATTN_DEVICE void release_value() {
    release_slot(&shared_.value_barriers.empty[value_.slot]);
    value_.next();
  }

  static PROXYATTN_DEVICE void copy(Probabilities& to, const Probabilities& from) {
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kProbabilities; ++i) to[i] = from[i];
  }

  PROXYATTN_DEVICE RowKeys<int> keys() const { return read_keys(shared_.rows[query_.slot]); }
  PROXYATTN_DEVICE int count_rows() const { return read_beside(shared_.rows[query_.slot].count); }

  PROXYATTN_DEVICE uint64_t key() const {
    return key_descriptor_ + key_.slot * descriptor_step(Traits::kKeyTileBytes);
  }
  PROXYATTN_DEVICE uint64_t value() const {
    return value_descriptor_ + value_.slot * descriptor_step(Traits::kKeyTileBytes);
  }

  PROXYATTN_DEVICE void wait_key() {
    ptx::mbarrier_wait(&shared_.key_barriers.full[key_.slot], key_.phase,
                       ptx::WaitSite::kConsumerKey);
  }
  PROXYATTN_DEVICE void release_key() {
    release_slot(&shared_.key_barriers.empty[key_.slot]);
    key_.next();
  }
  PROXYATTN_DEVICE void wait_key(TileParts<Traits>& parts, bool cut) {
    wait_key();
    PROXYATTN_UNROLL
    for (int i = 0; i < Traits::kParts; ++i) {
      parts[i] = read_beside(shared_.key_parts[key_.slot][i]);
    }
    if (Traits::kParts > 1 && cut) parts[Traits::kParts - 1] = kNoPart;
  }
  PROXYATTN_DEVICE void wait_value() {
    ptx::mbarrier_wait(&shared_.value_barriers.full[value_.slot], value_.phase,
                       ptx::WaitSite::kConsumerValue);
  }

  // The scores are in registers, so the key slot goes back; what it held decides about the mask.
  PROXYATTN_DEVICE void mask_and_release_key(Scores& s,
                                             int whole_parts,
                                             const TileParts<Traits>& parts) {
    release_key();
    mask_part<0>(s, whole_parts, parts[0]);
    if constexpr (Traits::kParts > 1) mask_part<1>(s, whole_parts, parts[1]);
  }

  template <int kPart>
  PROXYATTN_DEVICE void mask_part(Scores& s, int whole_parts, int part) {
    if (part < whole_parts) return;
    constexpr int kCount = Traits::kScores / Traits::kParts;
    const RowKeys<int> seen = keys();
    const int column = part_of(part) * Traits::kPartRows + (place_.thread & 3) * 2;
    const int end[2] = {seen.end(place_.row()), seen.end(place_.row() + 8)};
    hide_from<kPart * kCount, kCount>(s, column, end);
    if (!is_cut(part)) return;
    const int begin[2] = {seen.begin(place_.row()), seen.begin(place_.row() + 8)};
    hide_before<kPart * kCount, kCount>(s, column, begin);
  }

  const Problem& p_;
  SharedStorage<Traits>& shared_;
  GroupPlace place_;
  uint64_t query_descriptor_;
  uint64_t key_descriptor_;
  uint64_t value_descriptor_;
  uint64_t* stored_ = nullptr;  // barrier of a slot whose store may still be reading it
  Ring<Traits::kQueryStages> query_;
  Ring<Traits::kKeyStages> key_;
  Ring<Traits::kValueStages> value_;
};

}  // namespace proxyattn::cuda::sm90
