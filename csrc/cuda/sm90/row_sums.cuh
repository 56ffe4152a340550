// Sums of exponentials of a thread's two rows, by key block, in powers of two:
//   2^(factor * s - reference),  factor = scale * log2(e)
//
// The reference is the row's maximum in the first tile of a chunk of keys and stays there as long
// as the exponentials are in range, so that the common step needs no maxima, no shuffles and no
// rescaling. Whether it moves is decided for each row by itself: a row's bits don't depend on the
// rows that happen to be computed beside it.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sm90/logit_traits.h"

namespace proxyattn::cuda::sm90 {

// A thread's share of a row in one tile may sum up to this; far from where fp32 ends.
inline constexpr float kLargestRowSum = 1.0995116e12f;  // 2^40
// And one exponential of it to two to the power of this.
inline constexpr float kLargestExponent = 32.0f;

// -inf to the columns at and behind `limit[row]`. `column` is this thread's first column.
template <int kLogits>
PROXYATTN_DEVICE void mask_row_logits(float (&s)[kLogits], int column, const int (&limit)[2]) {
  PROXYATTN_UNROLL
  for (int i = 0; i < kLogits; ++i) {
    const int c = column + (i / 4) * 8 + (i & 1);
    if (c >= limit[(i >> 1) & 1]) s[i] = kMinusInfinity;
  }
}

// Key blocks of kBlockKeys keys in a tile of logits; a thread holds two rows of each.
template <int kBlockKeys>
struct TileBlocks {
  static constexpr int kBlocks = kLogitKeys / kBlockKeys;
  static constexpr int kOctets = kBlockKeys / 8;  // a thread holds two of every eight columns
  // Values of a part of the tile: value 2 * block + row. Of many blocks they are merged part by
  // part, so that registers hold them.
  static constexpr int kPartBlocks = kBlocks < 4 ? kBlocks : 4;
  static constexpr int kParts = kBlocks / kPartBlocks;
  using PartValues = float[2 * kPartBlocks];

  static PROXYATTN_DEVICE constexpr int logit(int block, int octet, int row, int column) {
    return 4 * (block * kOctets + octet) + 2 * row + column;
  }
};

struct RowSums {
  float reference[2];  // scaled; -inf before the first tile
  float sum[2];        // this thread's share

  PROXYATTN_DEVICE void reset() {
    reference[0] = reference[1] = kMinusInfinity;
    sum[0] = sum[1] = 0.0f;
  }

  // Adds a tile. collect(part, sums) is told the sums of a part's key blocks; what it was told
  // before counts no more when it is called for the same part again.
  template <int kBlockKeys, int kLogits, typename Collect>
  PROXYATTN_DEVICE void add(const float (&s)[kLogits], float factor, const Collect& collect) {
    float tile_sum[2];
    exponentiate<kBlockKeys>(s, factor, tile_sum, collect);
    // A row without reference and a NaN both fail the test.
    const bool fits[2] = {tile_sum[0] < kLargestRowSum, tile_sum[1] < kLargestRowSum};
    if (!__all_sync(kAllLanes, fits[0] && fits[1])) {
      rebase(s, factor, fits);
      exponentiate<kBlockKeys>(s, factor, tile_sum, collect);
    }
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
  }

  // For a caller that knows the largest of this thread's logits, by row: moves the references of
  // rows that are out of range first, and then adds the tile, whose logits need not outlive their
  // exponentials.
  template <int kBlockKeys, int kLogits>
  PROXYATTN_DEVICE void add_below(const float (&s)[kLogits],
                                  const float (&largest)[2],
                                  float factor) {
    // A row without reference fails the test, and so does one that has seen nothing yet.
    const bool fits[2] = {fmaf(largest[0], factor, -reference[0]) < kLargestExponent,
                          fmaf(largest[1], factor, -reference[1]) < kLargestExponent};
    if (!__all_sync(kAllLanes, fits[0] && fits[1])) move_references(largest, factor, fits);
    float tile_sum[2];
    exponentiate<kBlockKeys>(s, factor, tile_sum, [](int, const auto&) {});
    sum[0] += tile_sum[0];
    sum[1] += tile_sum[1];
  }

  // Base-2 log of the row's sum; -inf if it saw nothing. The same in the four lanes of a row.
  PROXYATTN_DEVICE float log2_sum(int row) const {
    const float total = group_sum<kQuadLanes>(sum[row]);
    return total == 0.0f ? kMinusInfinity : reference[row] + log2f(total);
  }

 private:
  template <int kBlockKeys, int kLogits, typename Collect>
  PROXYATTN_DEVICE void exponentiate(const float (&s)[kLogits],
                                     float factor,
                                     float (&tile_sum)[2],
                                     const Collect& collect) const {
    using Tile = TileBlocks<kBlockKeys>;
    tile_sum[0] = tile_sum[1] = 0.0f;
    PROXYATTN_UNROLL
    for (int part = 0; part < Tile::kParts; ++part) {
      typename Tile::PartValues sums;
      PROXYATTN_UNROLL
      for (int i = 0; i < 2 * Tile::kPartBlocks; ++i) {
        sums[i] = block_sum<kBlockKeys>(s, factor, part * Tile::kPartBlocks + i / 2, i % 2);
        tile_sum[i % 2] += sums[i];
      }
      collect(part, sums);
    }
  }

  template <int kBlockKeys, int kLogits>
  PROXYATTN_DEVICE float block_sum(const float (&s)[kLogits],
                                   float factor,
                                   int block,
                                   int row) const {
    using Tile = TileBlocks<kBlockKeys>;
    float sums[2];
    PROXYATTN_UNROLL
    for (int octet = 0; octet < Tile::kOctets; ++octet) {
      PROXYATTN_UNROLL
      for (int column = 0; column < 2; ++column) {
        const float e =
            softmax_weight(s[Tile::logit(block, octet, row, column)], reference[row], factor);
        sums[column] = octet == 0 ? e : sums[column] + e;
      }
    }
    return sums[0] + sums[1];
  }

  // The rare step: moves the references of rows that went out of range up to their maximum.
  template <int kLogits>
  PROXYATTN_DEVICE void rebase(const float (&s)[kLogits], float factor, const bool (&fits)[2]) {
    float largest[2];
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      largest[row] = s[2 * row];
      PROXYATTN_UNROLL
      for (int i = 0; i < kLogits / 4; ++i) {
        largest[row] = fmaxf(largest[row], fmaxf(s[4 * i + 2 * row], s[4 * i + 2 * row + 1]));
      }
    }
    move_references(largest, factor, fits);
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

struct RowMaxOp {
  PROXYATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct RowSumOp {
  PROXYATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};

// The largest logit of each key block of a part in a thread's two rows.
template <int kBlockKeys, int kLogits>
PROXYATTN_DEVICE void find_block_maxima(const float (&s)[kLogits],
                                        int part,
                                        typename TileBlocks<kBlockKeys>::PartValues& maxima) {
  using Tile = TileBlocks<kBlockKeys>;
  PROXYATTN_UNROLL
  for (int i = 0; i < Tile::kPartBlocks; ++i) {
    const int block = part * Tile::kPartBlocks + i;
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      float largest = s[Tile::logit(block, 0, row, 0)];
      PROXYATTN_UNROLL
      for (int octet = 0; octet < Tile::kOctets; ++octet) {
        if (octet > 0) largest = fmaxf(largest, s[Tile::logit(block, octet, row, 0)]);
        largest = fmaxf(largest, s[Tile::logit(block, octet, row, 1)]);
      }
      maxima[2 * i + row] = largest;
    }
  }
}

// Which values of kBlocks blocks a lane holds once the four lanes of a row have merged theirs:
// value QuadValues::first(lane) + i for i < kCount, a value being 2 * block + row. Of one block two
// lanes hold the same value.
template <int kBlocks>
struct QuadValues {
  static constexpr int kCount = kBlocks == 1 ? 1 : kBlocks / 2;
  using Values = float[kCount];

  static PROXYATTN_DEVICE int first(int lane) {
    const int low = (lane & 1) * kBlocks;
    return kBlocks == 1 ? low : low + (lane >> 1 & 1) * kCount;
  }
};

// Merges 2 * kBlocks values by giving away, step by step, the half that ends in the partner.
template <int kBlocks, typename Op>
PROXYATTN_DEVICE void merge_quad(const float (&values)[2 * kBlocks],
                                 typename QuadValues<kBlocks>::Values& merged,
                                 const Op& op) {
  const int lane = warp_lane();
  const bool upper = (lane & 1) != 0;
  float half[kBlocks];
  PROXYATTN_UNROLL
  for (int i = 0; i < kBlocks; ++i) {
    const float kept = upper ? values[kBlocks + i] : values[i];
    const float given = upper ? values[i] : values[kBlocks + i];
    half[i] = op(kept, __shfl_xor_sync(kAllLanes, given, 1));
  }
  if constexpr (kBlocks == 1) {
    merged[0] = op(half[0], __shfl_xor_sync(kAllLanes, half[0], 2));
  } else {
    constexpr int kCount = kBlocks / 2;
    const bool upper_pair = (lane & 2) != 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float kept = upper_pair ? half[kCount + i] : half[i];
      const float given = upper_pair ? half[i] : half[kCount + i];
      merged[i] = op(kept, __shfl_xor_sync(kAllLanes, given, 2));
    }
  }
}

}  // namespace proxyattn::cuda::sm90
