// What happens to the rows of a warp's accumulators between and after the two products: masking,
// the softmax step, and the final division.
#pragma once

#include <cstdint>

#include "common/visibility.h"
#include "cuda/attention/sm80/traits.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda::sm80 {

// Row, inside the warp's rows, of element 2 * half of row tile r.
PROXYATTN_DEVICE int accumulator_row(int lane, int r, int half) {
  return r * 16 + half * 8 + lane / 4;
}
// Column of element 0 of the n-th tile of 8 columns.
PROXYATTN_DEVICE int accumulator_column(int lane, int n) {
  return n * 8 + lane % 4 * 2;
}

// -inf to the keys from each row's end on. `first_row` is the warp's first row inside the query
// tile.
template <typename Traits>
PROXYATTN_DEVICE void hide_from_end(typename Traits::Scores& scores,
                                    const RowKeys<int>& seen,
                                    int first_row,
                                    int first_key,
                                    int lane) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int end = seen.end(first_row + accumulator_row(lane, r, half)) - first_key;
      PROXYATTN_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; ++n) {
        const int column = accumulator_column(lane, n);
        if (column >= end) scores[r][n][2 * half] = kMinusInfinity;
        if (column + 1 >= end) scores[r][n][2 * half + 1] = kMinusInfinity;
      }
    }
  }
}

// The same to the keys before each row's first.
template <typename Traits>
PROXYATTN_DEVICE void hide_before_begin(typename Traits::Scores& scores,
                                        const RowKeys<int>& seen,
                                        int first_row,
                                        int first_key,
                                        int lane) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int begin = seen.begin(first_row + accumulator_row(lane, r, half)) - first_key;
      PROXYATTN_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; ++n) {
        const int column = accumulator_column(lane, n);
        if (column < begin) scores[r][n][2 * half] = kMinusInfinity;
        if (column + 1 < begin) scores[r][n][2 * half + 1] = kMinusInfinity;
      }
    }
  }
}

// Softmax state of the rows of which a lane holds a part.
template <typename Traits>
struct RowState {
  typename Traits::PerRow max;  // of the unscaled logits, the same in the four lanes of a row
  typename Traits::PerRow sum;  // of this lane's columns only

  PROXYATTN_DEVICE RowState() {
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      PROXYATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        max[r][half] = kMinusInfinity;
        sum[r][half] = 0.0f;
      }
    }
  }
};

// Exponentiates scores against the new maxima. `rescale` is what earlier sums must be multiplied
// by.
template <typename Traits>
PROXYATTN_DEVICE void softmax_step(typename Traits::Scores& scores,
                                   RowState<Traits>& state,
                                   typename Traits::PerRow& rescale,
                                   float factor) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float row_max = state.max[r][half];
      PROXYATTN_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; ++n) {
        row_max = fmaxf(row_max, fmaxf(scores[r][n][2 * half], scores[r][n][2 * half + 1]));
      }
      row_max = group_max<kQuadLanes>(row_max);
      const float reference = softmax_reference(row_max, factor);
      rescale[r][half] = softmax_rescale(state.max[r][half], reference, factor);
      state.max[r][half] = row_max;

      float sum = 0.0f;
      PROXYATTN_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; ++n) {
        PROXYATTN_UNROLL
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[r][n][i] = softmax_weight(scores[r][n][i], reference, factor);
          sum += scores[r][n][i];
        }
      }
      state.sum[r][half] = fmaf(state.sum[r][half], rescale[r][half], sum);
    }
  }
}

// Rounds the exponentiated scores to operands of the second product.
template <typename Traits>
PROXYATTN_DEVICE void pack_weights(typename Traits::Weights& weights,
                                   const typename Traits::Scores& scores) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      const float(&s)[4] = scores[r][n];
      weights[r][n / 2][n % 2 * 2] = pack_pair<typename Traits::Element>(s[0], s[1]);
      weights[r][n / 2][n % 2 * 2 + 1] = pack_pair<typename Traits::Element>(s[2], s[3]);
    }
  }
}

template <typename Traits>
PROXYATTN_DEVICE void scale_rows(typename Traits::Sums& sums,
                                 const typename Traits::PerRow& factors) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int d = 0; d < Traits::kDimTiles; ++d) {
      PROXYATTN_UNROLL
      for (int i = 0; i < 4; ++i) sums[r][d][i] *= factors[r][i / 2];
    }
  }
}

// Brings the sums to the new maxima. Maxima soon settle, so a warp none of whose rows moved skips
// the products.
template <typename Traits>
PROXYATTN_DEVICE void rescale_sums(typename Traits::Sums& sums,
                                   const typename Traits::PerRow& rescale) {
  bool moved = false;
  PROXYATTN_UNROLL
  for (const auto& pair : rescale) moved = moved || pair[0] != 1.0f || pair[1] != 1.0f;
  if (__any_sync(kAllLanes, moved)) scale_rows<Traits>(sums, rescale);
}

}  // namespace proxyattn::cuda::sm80
