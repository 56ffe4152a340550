// Sums of exponentials of a thread's two rows, in powers of two:
//   2^(factor * s - reference),  factor = scale * log2(e)
//
// The reference is the row's maximum in the first tile of a chunk of keys and stays there as long
// as the exponentials are in range, so that the common step needs no maxima, no shuffles and no
// rescaling. Whether it moves is decided for each row by itself: a row's bits don't depend on the
// rows that happen to be computed beside it.
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sm90/lane_keys.cuh"

namespace proxyattn::cuda::sm90 {

// A thread's share of a row in one tile may sum up to this; far from where fp32 ends.
inline constexpr float kLargestRowSum = 1.0995116e12f;  // 2^40
// And one exponential of it to two to the power of this.
inline constexpr float kLargestExponent = 32.0f;

struct RowSums {
  float reference[2];  // scaled; -inf before the first tile
  float sum[2];        // this thread's share

  PROXYATTN_DEVICE void reset() {
    reference[0] = reference[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  PROXYATTN_DEVICE float reference_of(int row) const {
    return row == 0 ? reference[0] : reference[1];
  }

  // Adds a tile and says what the lane's blocks add to it.
  template <int kBlockKeys>
  PROXYATTN_DEVICE void add(const float (&s)[kLaneLogits],
                            float factor,
                            typename LaneBlocks<kBlockKeys>::Values& blocks) {
    float total[2];
    exponentiate<kBlockKeys>(s, factor, blocks, total);
    // A row without reference and a NaN both fail the test.
    const bool fits[2] = {total[0] < kLargestRowSum, total[1] < kLargestRowSum};
    if (!__all_sync(kAllLanes, fits[0] && fits[1])) {
      float largest[2];
      find_block_maxima<kLogitKeys>(s, largest);
      move_references(largest, factor, fits);
      exponentiate<kBlockKeys>(s, factor, blocks, total);
    }
    sum[0] += total[0];
    sum[1] += total[1];
  }

  // For a caller that knows the largest of this thread's logits, by row: moves the references of
  // rows that are out of range first, and then adds the tile, whose logits need not outlive their
  // exponentials.
  template <int kBlockKeys>
  PROXYATTN_DEVICE void add_below(const float (&s)[kLaneLogits],
                                  const float (&largest)[2],
                                  float factor,
                                  typename LaneBlocks<kBlockKeys>::Values& blocks) {
    // A row without reference fails the test, and so does one that has seen nothing yet.
    const bool fits[2] = {fmaf(largest[0], factor, -reference[0]) < kLargestExponent,
                          fmaf(largest[1], factor, -reference[1]) < kLargestExponent};
    if (!__all_sync(kAllLanes, fits[0] && fits[1])) move_references(largest, factor, fits);
    float total[2];
    exponentiate<kBlockKeys>(s, factor, blocks, total);
    sum[0] += total[0];
    sum[1] += total[1];
  }

  // Base-2 log of the row's sum; -inf if it saw nothing. The same in the four lanes of a row.
  PROXYATTN_DEVICE float log2_sum(int row) const {
    const float total = group_sum<kQuadLanes>(sum[row]);
    return total == 0.0f ? kMinusInfinity : reference[row] + log2f(total);
  }

 private:
  template <int kBlockKeys>
  PROXYATTN_DEVICE void exponentiate(const float (&s)[kLaneLogits],
                                     float factor,
                                     typename LaneBlocks<kBlockKeys>::Values& blocks,
                                     float (&total)[2]) const {
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      float sums[2];  // of the two runs
      PROXYATTN_UNROLL
      for (int j = 0; j < kRunKeys; ++j) {
        PROXYATTN_UNROLL
        for (int run = 0; run < 2; ++run) {
          const float e = softmax_weight(s[logit(j, row, run)], reference[row], factor);
          sums[run] = j == 0 ? e : sums[run] + e;
        }
      }
      total[row] = sums[0] + sums[1];
      if constexpr (LaneBlocks<kBlockKeys>::kBlocks == 2) {
        blocks[row] = sums[0];
        blocks[2 + row] = sums[1];
      } else {
        blocks[row] = total[row];
      }
    }
  }

  PROXYATTN_DEVICE void move_references(const float (&tile_largest)[2],
                                        float factor,
                                        const bool (&fits)[2]) {
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      const float largest = group_max<kQuadLanes>(tile_largest[row]);
      const int stays = group_and<kQuadLanes>(fits[row]);
      const float moved = fmaxf(reference[row], largest * factor);
      // Keys come in rising order, so a row that has seen nothing yet never will in this chunk;
      // any finite reference makes its exponentials 0.
      const float next = stays ? reference[row] : moved == kMinusInfinity ? 0.0f : moved;
      sum[row] *= stays ? 1.0f : ptx::ex2(reference[row] - next);
      reference[row] = next;
    }
  }

  template <int kLanes>
  static PROXYATTN_DEVICE bool group_and(bool value) {
    int all = value;
    PROXYATTN_UNROLL
    for (int distance = 1; distance < kLanes; distance *= 2) {
      all &= __shfl_xor_sync(kAllLanes, all, distance);
    }
    return all != 0;
  }
};

}  // namespace proxyattn::cuda::sm90
