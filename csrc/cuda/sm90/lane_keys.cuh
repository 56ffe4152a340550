// Which keys and key blocks a thread's logits of a tile belong to; key_maps.h says why.
//
//   logit(j, row, run), j < 16: of row lane / 4 + 8 * row of the warp, and of key
//   32 * (lane % 4) + 16 * run + j of the tile
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

static_assert(kMinBlockKeys == kRunKeys, "a lane's run may be of one key block only");
inline constexpr int kLaneKeys = kLogitKeys / kQuadLanes;
inline constexpr int kLaneLogits = 2 * kLaneKeys;

PROXYATTN_DEVICE constexpr int logit(int j, int row, int run) {
  return 4 * j + 2 * row + run;
}

// The thread's first key in the tile.
PROXYATTN_DEVICE int first_lane_key() {
  return warp_lane() % kQuadLanes * kLaneKeys;
}

// -inf to the keys at and behind `limit[row]`, counted like `first_key`, the thread's first.
PROXYATTN_DEVICE void mask_row_logits(float (&s)[kLaneLogits],
                                      int first_key,
                                      const int (&limit)[2]) {
  PROXYATTN_UNROLL
  for (int i = 0; i < kLaneLogits; ++i) {
    const int key = first_key + i % 2 * kRunKeys + i / 4;
    if (key >= limit[i / 2 % 2]) s[i] = kMinusInfinity;
  }
}

// Of a tile that came in order: lane l of a quad holds keys 8 * i + 2 * l + {0, 1}, i < 16. Lane q
// is given those with i / 4 == q by the others, in two steps that exchange half of what there is.
PROXYATTN_DEVICE void gather_lane_keys(float (&s)[kLaneLogits]) {
  constexpr int kGroup = kLaneLogits / kQuadLanes;  // of one lane's keys
  PROXYATTN_UNROLL
  for (int bit = 1; bit < kQuadLanes; bit *= 2) {
    const bool upper = (warp_lane() & bit) != 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < kLaneLogits; ++i) {
      if ((i / kGroup & bit) != 0) continue;
      float& low = s[i];
      float& high = s[i + bit * kGroup];
      const float received = __shfl_xor_sync(kAllLanes, upper ? low : high, bit);
      if (upper) {
        low = received;
      } else {
        high = received;
      }
    }
  }
  // Group l is now lane l's: keys 8 * i + 2 * l + {0, 1} of this lane's 32, i < 4.
  float ordered[kLaneLogits];
  PROXYATTN_UNROLL
  for (int key = 0; key < kLaneKeys; ++key) {
    PROXYATTN_UNROLL
    for (int row = 0; row < 2; ++row) {
      ordered[logit(key % kRunKeys, row, key / kRunKeys)] =
          s[key / 2 % kQuadLanes * kGroup + logit(key / 8, row, key % 2)];
    }
  }
  PROXYATTN_UNROLL
  for (int i = 0; i < kLaneLogits; ++i) s[i] = ordered[i];
}

// A value for each row and key block of a tile, and where they end when the lanes that share a
// block have merged theirs: with blocks of 16 keys a lane holds two blocks and both rows of each,
// with 32 one block and both rows, else one row of one block; with 128 two lanes hold the same.
template <int kBlockKeys>
struct LaneBlocks {
  static_assert(kMinBlockKeys <= kBlockKeys && kBlockKeys <= kLogitKeys);
  static constexpr int kTileBlocks = kLogitKeys / kBlockKeys;
  static constexpr int kBlocks = kBlockKeys == kRunKeys ? 2 : 1;  // of a lane
  static constexpr bool kBothRows = kBlockKeys <= kLaneKeys;
  // Value 2 * block + row, both of a lane.
  using Values = float[2 * kBlocks];
  static constexpr int kCount = kBothRows ? 2 * kBlocks : 1;
  using Merged = float[kCount];

  // In the tile, of the lane's block i.
  static PROXYATTN_DEVICE int block(int lane, int i) {
    return lane % kQuadLanes * kBlocks * kLaneKeys / max_of(kBlockKeys, kLaneKeys) + i;
  }
  // Of the lane's merged value i.
  static PROXYATTN_DEVICE int row(int lane, int i) { return kBothRows ? i % 2 : lane % 2; }

  template <typename Op>
  static PROXYATTN_DEVICE void merge(const Values& values, Merged& merged, const Op& op) {
    if constexpr (kBothRows) {
      PROXYATTN_UNROLL
      for (int i = 0; i < kCount; ++i) merged[i] = values[i];
    } else {
      const bool upper = warp_lane() % 2 != 0;
      merged[0] = op(upper ? values[1] : values[0],
                     __shfl_xor_sync(kAllLanes, upper ? values[0] : values[1], 1));
      if constexpr (kBlockKeys == kLogitKeys) {
        merged[0] = op(merged[0], __shfl_xor_sync(kAllLanes, merged[0], 2));
      }
    }
  }
};

struct RowMaxOp {
  PROXYATTN_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct RowSumOp {
  PROXYATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};

// The largest logit of each of the lane's blocks.
template <int kBlockKeys>
PROXYATTN_DEVICE void find_block_maxima(const float (&s)[kLaneLogits],
                                        typename LaneBlocks<kBlockKeys>::Values& maxima) {
  PROXYATTN_UNROLL
  for (int row = 0; row < 2; ++row) {
    float largest[2];  // of the two runs
    PROXYATTN_UNROLL
    for (int run = 0; run < 2; ++run) {
      largest[run] = s[logit(0, row, run)];
      PROXYATTN_UNROLL
      for (int j = 1; j < kRunKeys; ++j) largest[run] = fmaxf(largest[run], s[logit(j, row, run)]);
    }
    if constexpr (LaneBlocks<kBlockKeys>::kBlocks == 2) {
      maxima[row] = largest[0];
      maxima[2 + row] = largest[1];
    } else {
      maxima[row] = fmaxf(largest[0], largest[1]);
    }
  }
}

}  // namespace proxyattn::cuda::sm90
