// The end of a query tile: normalise, stage the output in shared memory, store it by the copy
// engine; and the tile that has nothing to see.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/attention/sm90/softmax.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace proxyattn::cuda::sm90 {

// Where a warpgroup stands inside a query tile.
struct GroupPlace {
  int group;      // warpgroup of the team, 0 or 1
  int barrier;    // its named barrier
  int thread;     // in the warpgroup
  int first_row;  // query of the warpgroup's row 0

  PROXYATTN_DEVICE int lane() const { return thread & 31; }
  PROXYATTN_DEVICE int warp() const { return thread >> 5; }
  // This thread's upper query; the lower one is eight further.
  PROXYATTN_DEVICE int query() const { return first_row + warp() * 16 + lane() / 4; }
};

inline constexpr int kFirstEpilogueBarrier = 4;  // named barriers 4 to 7, one a warpgroup

template <int Outputs>
PROXYATTN_DEVICE void normalise(float (&o)[Outputs], const RowState& state) {
  float inverse[2];
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    inverse[r] = state.sum[r] == 0.0f ? 0.0f : __fdividef(1.0f, state.sum[r]);
  }
  PROXYATTN_UNROLL
  for (int i = 0; i < Outputs; ++i) o[i] *= inverse[(i >> 1) & 1];
}

PROXYATTN_DEVICE void store_lse(const Problem& p,
                                const TileInfo& tile,
                                const GroupPlace& place,
                                const RowState& state) {
  if (p.lse == nullptr || (place.lane() & 3) != 0) return;
  float* lse = p.lse + (static_cast<int64_t>(tile.batch) * p.tiles.q_heads + tile.head) * p.q_len;
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int query = place.query() + 8 * r;
    if (query < p.q_len) {
      lse[query] = log_sum(state.reference[r], state.sum[r], 1.0f);
    }
  }
}

// Each warpgroup stages its output over its own 64 rows of the consumed query tile: only its own
// products read those rows, and they are done.
template <typename Traits>
PROXYATTN_DEVICE void stage_output(uint8_t* query_tile,
                                   const float (&o)[Traits::kOutputs],
                                   const GroupPlace& place) {
  using Element = typename Traits::Element;
  const int lane = place.lane();
  const int row = place.warp() * 16 + (lane & 15);
  const uint32_t row_address = ptx::shared_address(query_tile) + Traits::group_bytes(place.group) +
                               row * Traits::kBoxRowBytes;
  PROXYATTN_UNROLL
  for (int j = 0; j < Traits::kHeadDim / 16; ++j) {  // 16 columns, two 16-byte chunks
    const uint32_t chunk = (j & 3) * 2 + (lane >> 4);
    const uint32_t address =
        row_address + (j >> 2) * Traits::kQueryBoxBytes + ((chunk ^ (lane & 7)) << 4);
    ptx::stmatrix_x4(address, pack_pair<Element>(o[8 * j], o[8 * j + 1]),
                     pack_pair<Element>(o[8 * j + 2], o[8 * j + 3]),
                     pack_pair<Element>(o[8 * j + 4], o[8 * j + 5]),
                     pack_pair<Element>(o[8 * j + 6], o[8 * j + 7]));
  }
}

// Starts the store of the warpgroup's rows. The query slot goes back in finish_store.
template <typename Traits>
PROXYATTN_DEVICE void store_output(const Problem& p,
                                   SharedStorage<Traits>& shared,
                                   const TileInfo& tile,
                                   const GroupPlace& place,
                                   int slot) {
  // The staged rows must be visible to the copy engine before one thread starts the store.
  ptx::fence_shared_for_async();
  ptx::named_barrier_sync(place.barrier, 128);
  if (place.thread == 0) {
    const uint8_t* rows = shared.query[slot] + Traits::group_bytes(place.group);
    PROXYATTN_UNROLL
    for (int box = 0; box < Traits::kBoxes; ++box) {
      ptx::tma_store(&p.out_map, rows + box * Traits::kQueryBoxBytes, 0, place.first_row, box,
                     tile.head, tile.batch);
    }
    ptx::tma_store_commit();
  }
}

// Gives back the slot that rows were stored from, once the copy engine has read it: one thread
// knows, the other warps have no say in that.
PROXYATTN_DEVICE void finish_store(const GroupPlace& place, uint64_t* empty) {
  if (place.thread == 0) ptx::tma_store_wait_read();
  release_slot(empty);
}

// A tile without blocks: zeros and -inf, two threads a row. Then the slot goes back.
template <typename Traits>
PROXYATTN_DEVICE void store_nothing(const Problem& p,
                                    SharedStorage<Traits>& shared,
                                    const TileInfo& tile,
                                    const GroupPlace& place,
                                    int slot) {
  constexpr int kHalfRow = Traits::kHeadDim / 2;
  const int query = place.first_row + place.thread / 2;
  if (query < p.q_len) {
    auto* out = static_cast<typename Traits::Element*>(p.out) + tile.batch * p.out_batch_stride +
                query * p.out_token_stride + tile.head * p.out_head_stride +
                (place.thread & 1) * kHalfRow;
    auto* chunks = reinterpret_cast<uint4*>(out);
    constexpr int kChunks = kHalfRow * sizeof(typename Traits::Element) / sizeof(uint4);
    PROXYATTN_UNROLL
    for (int i = 0; i < kChunks; ++i) chunks[i] = make_uint4(0, 0, 0, 0);
    if (p.lse != nullptr && (place.thread & 1) == 0) {
      const int64_t head = static_cast<int64_t>(tile.batch) * p.tiles.q_heads + tile.head;
      p.lse[head * p.q_len + query] = kMinusInfinity;
    }
  }
  release_slot(&shared.query_barriers.empty[slot]);
}

}  // namespace proxyattn::cuda::sm90
