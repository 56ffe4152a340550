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
  int first_row;  // the warpgroup's row 0 in the query block

  PROXYATTN_DEVICE int lane() const { return thread & 31; }
  PROXYATTN_DEVICE int warp() const { return thread >> 5; }
  // This thread's upper row of the query block; the lower one is eight further.
  PROXYATTN_DEVICE int row() const { return first_row + warp() * 16 + lane() / 4; }
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

PROXYATTN_DEVICE float sink_logit(const Problem& p, const TileInfo& tile) {
  return __ldg(p.sink_logits + tile.head);
}

// lse of the query block's row 0.
PROXYATTN_DEVICE float* row_lse(const Problem& p, const TileInfo& tile) {
  const int64_t head = static_cast<int64_t>(tile.batch) * p.tiles.q_heads + tile.head;
  return p.lse + head * p.lse_pitch + tile.token;
}

// Half of a row of the query block in global memory: chunks of 16 bytes, two threads a row.
template <typename Traits>
struct OutputHalf {
  static constexpr int kChunks = Traits::kHeadDim / 16;
  uint4* chunks;
  int row;  // of the warpgroup

  PROXYATTN_DEVICE OutputHalf(const Problem& p, const TileInfo& tile, const GroupPlace& place)
      : row(place.thread / 2) {
    const int64_t token = tile.token + place.first_row + row;
    auto* out = static_cast<typename Traits::Element*>(p.out) + tile.batch * p.out_batch_stride +
                token * p.out_token_stride + tile.head * p.out_head_stride;
    chunks = reinterpret_cast<uint4*>(out) + first_chunk(place);
  }

  static PROXYATTN_DEVICE int first_chunk(const GroupPlace& place) {
    return (place.thread & 1) * kChunks;
  }
};

PROXYATTN_DEVICE void store_lse(const Problem& p,
                                const TileInfo& tile,
                                const GroupPlace& place,
                                int num_rows,
                                const RowState& state) {
  if (p.lse == nullptr || (place.lane() & 3) != 0) return;
  float* lse = row_lse(p, tile);
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int row = place.row() + 8 * r;
    if (row < num_rows) lse[row] = log_sum(state.reference[r], state.sum[r], 1.0f);
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

// Of rows that another sequence's follow, which the copy engine would overwrite: those that exist.
template <typename Traits>
PROXYATTN_DEVICE void copy_output(const Problem& p,
                                  const TileInfo& tile,
                                  const GroupPlace& place,
                                  int num_rows,
                                  const uint8_t* staged) {
  const OutputHalf<Traits> half(p, tile, place);
  if (place.first_row + half.row >= num_rows) return;
  PROXYATTN_UNROLL
  for (int i = 0; i < half.kChunks; ++i) {
    const int chunk = half.first_chunk(place) + i;
    const uint8_t* box = staged + (chunk / 8) * Traits::kQueryBoxBytes;
    half.chunks[i] = *reinterpret_cast<const uint4*>(box + half.row * Traits::kBoxRowBytes +
                                                     ((chunk % 8 ^ half.row % 8) << 4));
  }
}

// Starts the store of the warpgroup's rows. The query slot goes back in finish_store.
template <typename Traits>
PROXYATTN_DEVICE void store_output(const Problem& p,
                                   SharedStorage<Traits>& shared,
                                   const TileInfo& tile,
                                   const GroupPlace& place,
                                   int num_rows,
                                   int slot) {
  // The staged rows must be visible to the copy engine before one thread starts the store.
  ptx::fence_shared_for_async();
  ptx::named_barrier_sync(place.barrier, 128);
  const uint8_t* rows = shared.query[slot] + Traits::group_bytes(place.group);
  if (p.packed.count > 0 && num_rows < place.first_row + kWarpgroupRows) {
    copy_output<Traits>(p, tile, place, num_rows, rows);
  } else if (place.thread == 0) {
    PROXYATTN_UNROLL
    for (int box = 0; box < Traits::kBoxes; ++box) {
      ptx::tma_store(&p.out_map, rows + box * Traits::kQueryBoxBytes, 0,
                     tile.token + place.first_row, box, tile.head, tile.batch);
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

// A tile without blocks: zeros, and the sink or -inf, two threads a row. Then the slot goes back.
template <typename Traits>
PROXYATTN_DEVICE void store_nothing(const Problem& p,
                                    SharedStorage<Traits>& shared,
                                    const TileInfo& tile,
                                    const GroupPlace& place,
                                    int num_rows,
                                    int slot) {
  const OutputHalf<Traits> half(p, tile, place);
  const int row = place.first_row + half.row;
  if (row < num_rows) {
    PROXYATTN_UNROLL
    for (int i = 0; i < half.kChunks; ++i) half.chunks[i] = make_uint4(0, 0, 0, 0);
    if (p.lse != nullptr && (place.thread & 1) == 0) {
      row_lse(p, tile)[row] = p.sink_logits == nullptr ? kMinusInfinity : sink_logit(p, tile);
    }
  }
  release_slot(&shared.query_barriers.empty[slot]);
}

}  // namespace proxyattn::cuda::sm90
