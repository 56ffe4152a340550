// The end of a query tile: divide by the row sums, round, store out and lse.
//
// Rows go through the warp's own part of the query tile in shared memory, which nobody reads any
// more, so that global memory is written 16 bytes a lane in whole rows.
#pragma once

#include <cstdint>

#include "cuda/attention/sm80/rows.cuh"
#include "cuda/attention/sm80/traits.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/cp_async.cuh"

namespace proxyattn::cuda::sm80 {

// Sums of whole rows: the four lanes of a row add their shares.
template <typename Traits>
PROXYATTN_DEVICE void complete_sums(RowState<Traits>& state) {
  PROXYATTN_UNROLL
  for (auto& pair : state.sum) {
    PROXYATTN_UNROLL
    for (float& sum : pair) sum = group_sum<kQuadLanes>(sum);
  }
}

// A column of this logit and without a value joins the rows, whose sums are complete. Maxima are
// those of unscaled logits, so it is taken for one whose scaled value it is.
template <typename Traits>
PROXYATTN_DEVICE void join_sink(typename Traits::Sums& sums,
                                RowState<Traits>& state,
                                float sink,
                                float factor) {
  const float logit = sink * kLog2E / factor;
  typename Traits::PerRow rescale;
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float row_max = fmaxf(state.max[r][half], logit);
      const float reference = softmax_reference(row_max, factor);
      rescale[r][half] = softmax_rescale(state.max[r][half], reference, factor);
      state.sum[r][half] =
          fmaf(state.sum[r][half], rescale[r][half], softmax_weight(logit, reference, factor));
      state.max[r][half] = row_max;
    }
  }
  scale_rows<Traits>(sums, rescale);
}

// A row that saw nothing has sum 0 and stays 0.
template <typename Traits>
PROXYATTN_DEVICE void normalise(typename Traits::Sums& sums, const RowState<Traits>& state) {
  typename Traits::PerRow inverse;
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float sum = state.sum[r][half];
      inverse[r][half] = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
    }
  }
  scale_rows<Traits>(sums, inverse);
}

// `lse` is the entry of the warp's first row. Of the warp's rows the first `valid_rows` exist; the
// others are not written.
template <typename Traits>
PROXYATTN_DEVICE void store_lse(
    float* lse, const RowState<Traits>& state, float factor, int valid_rows, int lane) {
  if (lane % kQuadLanes != 0) return;
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = accumulator_row(lane, r, half);
      if (row < valid_rows) lse[row] = log_sum(state.max[r][half], state.sum[r][half], factor);
    }
  }
}

// `stage` is the warp's first row in shared memory, `out` the one in global memory.
template <typename Traits>
PROXYATTN_DEVICE void store_rows(typename Traits::Element* out,
                                 int64_t row_stride,
                                 bool aligned,
                                 const typename Traits::Sums& sums,
                                 uint32_t stage,
                                 int valid_rows,
                                 int lane) {
  using Tile = typename Traits::Tile;
  using Element = typename Traits::Element;
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      PROXYATTN_UNROLL
      for (int d = 0; d < Traits::kDimTiles; ++d) {
        const uint32_t pair = pack_pair<Element>(sums[r][d][2 * half], sums[r][d][2 * half + 1]);
        const uint32_t chunk = Tile::offset(accumulator_row(lane, r, half), d);
        ptx::store_shared_4(stage + chunk + lane % 4 * 4, pair);
      }
    }
  }
  // Orders the lanes' stores before the other lanes' loads of them.
  __syncwarp();
  constexpr int kRowsPerPass = kWarpLanes / min_of(kWarpLanes, Tile::kChunks);
  const int chunk = lane % Tile::kChunks;
  for (int row = lane / Tile::kChunks; row < min_of(valid_rows, Traits::kWarpRows);
       row += kRowsPerPass) {
    const uint4 value = ptx::load_shared_16(stage + Tile::offset(row, chunk));
    Element* target = out + row * row_stride + chunk * kChunkElements;
    if (aligned) {
      *reinterpret_cast<uint4*>(target) = value;
    } else {
      scatter_chunk(target, value);
    }
  }
}

}  // namespace proxyattn::cuda::sm80
