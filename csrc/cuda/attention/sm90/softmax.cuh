// Online softmax of one key tile, on a thread's share of the scores: two rows, every fourth pair
// of columns. Works in powers of two: exp(scale * s) = exp2(scale_log2 * s).
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/traits.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda::sm90 {

// Running state of a thread's two rows, eight apart, in powers of two.
//
// The reference need not be the row's maximum: any value will do that keeps exponentials in range.
// So it is set by the first tile and moves only when a tile's exponentials grow too large, which
// real attention all but never does. Steps in between need no maxima, no shuffles and no rescaling.
// Whether it moves is decided for each row by itself: a row's bits don't depend on its neighbours.
struct RowState {
  float reference[2];  // scaled; -inf until the row has seen a key
  float sum[2];        // this thread's share of the sum of exponentials

  PROXYATTN_DEVICE void reset() {
    reference[0] = reference[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
  }
};

// A thread's share of a row in one tile may sum up to this: every exponential in it then fits fp16,
// whose largest number is 65504.
inline constexpr float kLargestTileSum = 16384.0f;

// -inf to the columns at and behind `end[row]`, of scores [kFirst, kFirst + kCount). `column` is
// the first column among them that is this thread's.
template <int kFirst, int kCount, int Scores>
PROXYATTN_DEVICE void hide_from(float (&s)[Scores], int column, const int (&end)[2]) {
  PROXYATTN_UNROLL
  for (int i = kFirst; i < kFirst + kCount; ++i) {
    const int c = column + (i - kFirst) / 4 * 8 + (i & 1);
    if (c >= end[(i >> 1) & 1]) s[i] = kMinusInfinity;
  }
}

// The same to the columns before `begin[row]`.
template <int kFirst, int kCount, int Scores>
PROXYATTN_DEVICE void hide_before(float (&s)[Scores], int column, const int (&begin)[2]) {
  PROXYATTN_UNROLL
  for (int i = kFirst; i < kFirst + kCount; ++i) {
    const int c = column + (i - kFirst) / 4 * 8 + (i & 1);
    if (c < begin[(i >> 1) & 1]) s[i] = kMinusInfinity;
  }
}

// Exponentials of the scores against `reference`, as the next product's A operand (the layout of an
// accumulator is that of the operand), and their sums.
template <typename Element, int Scores>
PROXYATTN_DEVICE void exponentiate(const float (&s)[Scores],
                                   const float (&reference)[2],
                                   float scale_log2,
                                   uint32_t (&p)[Scores / 2],
                                   float (&tile_sum)[2]) {
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    float sum0 = 0.0f, sum1 = 0.0f;
    PROXYATTN_UNROLL
    for (int j = 0; j < Scores / 4; ++j) {
      const float e0 = softmax_weight(s[4 * j + 2 * r], reference[r], scale_log2);
      const float e1 = softmax_weight(s[4 * j + 2 * r + 1], reference[r], scale_log2);
      p[2 * j + r] = pack_pair<Element>(e0, e1);
      sum0 += e0;
      sum1 += e1;
    }
    tile_sum[r] = sum0 + sum1;
  }
}

// The common step: the reference stays. Says of this thread's share of each row whether its
// exponentials were in range, and returns, the same for the whole warp, whether all were; if not,
// nothing has been added and the caller rebases. A row without reference and a NaN both fail.
template <typename Element, int Scores>
PROXYATTN_DEVICE bool softmax_step(const float (&s)[Scores],
                                   RowState& state,
                                   float scale_log2,
                                   uint32_t (&p)[Scores / 2],
                                   bool (&fits)[2]) {
  float tile_sum[2];
  exponentiate<Element>(s, state.reference, scale_log2, p, tile_sum);
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) fits[r] = tile_sum[r] < kLargestTileSum;
  if (!__all_sync(kAllLanes, fits[0] && fits[1])) return false;
  state.sum[0] += tile_sum[0];
  state.sum[1] += tile_sum[1];
  return true;
}

// The rare step: moves the references of rows that don't fit up to their maximum. `rescale[row]` is
// the factor that the output accumulated so far must be multiplied with.
template <typename Element, int Scores>
PROXYATTN_DEVICE void softmax_rebase(const float (&s)[Scores],
                                     RowState& state,
                                     float scale_log2,
                                     uint32_t (&p)[Scores / 2],
                                     const bool (&fits)[2],
                                     float (&rescale)[2]) {
  float reference[2];
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    float tile_max = s[2 * r];
    PROXYATTN_UNROLL
    for (int j = 0; j < Scores / 4; ++j) {
      tile_max = fmaxf(tile_max, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    }
    tile_max = fmaxf(tile_max, __shfl_xor_sync(kAllLanes, tile_max, 1));
    tile_max = fmaxf(tile_max, __shfl_xor_sync(kAllLanes, tile_max, 2));
    int stays = fits[r];  // in all four threads of the row
    stays &= __shfl_xor_sync(kAllLanes, stays, 1);
    stays &= __shfl_xor_sync(kAllLanes, stays, 2);
    const float moved =
        stays ? state.reference[r] : fmaxf(state.reference[r], tile_max * scale_log2);
    // A row that has still seen nothing keeps -inf; any finite reference makes its exponentials 0.
    reference[r] = softmax_reference(moved, 1.0f);
    rescale[r] = softmax_rescale(state.reference[r], reference[r], 1.0f);
    state.reference[r] = moved;
  }
  float tile_sum[2];
  exponentiate<Element>(s, reference, scale_log2, p, tile_sum);
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) state.sum[r] = fmaf(state.sum[r], rescale[r], tile_sum[r]);
}

template <int Outputs>
PROXYATTN_DEVICE void rescale_output(float (&o)[Outputs], const float (&rescale)[2]) {
  PROXYATTN_UNROLL
  for (int i = 0; i < Outputs; ++i) o[i] *= rescale[(i >> 1) & 1];
}

// Sums of whole rows: the four threads of a row add their shares.
PROXYATTN_DEVICE void sum_rows(RowState& state) {
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    state.sum[r] += __shfl_xor_sync(kAllLanes, state.sum[r], 1);
    state.sum[r] += __shfl_xor_sync(kAllLanes, state.sum[r], 2);
  }
}

// A column of this logit, in powers of two, and without a value joins rows whose sums are complete.
template <int Outputs>
PROXYATTN_DEVICE void join_sink(float (&o)[Outputs], RowState& state, float sink) {
  float rescale[2];
  PROXYATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const float moved = fmaxf(state.reference[r], sink);
    const float reference = softmax_reference(moved, 1.0f);
    rescale[r] = softmax_rescale(state.reference[r], reference, 1.0f);
    state.sum[r] = fmaf(state.sum[r], rescale[r], softmax_weight(sink, reference, 1.0f));
    state.reference[r] = moved;
  }
  rescale_output(o, rescale);
}

}  // namespace proxyattn::cuda::sm90
