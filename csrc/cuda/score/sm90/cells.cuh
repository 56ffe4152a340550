// What consumers leave in scratch for each row and key block, and in which layout.
//
// Each lane of a warp holds LaneBlocks::kCount values of a tile. A warp's values of one key tile
// lie together, lane by lane, so that it stores and a finisher loads whole cache lines: [key
// tile][row group of 16 rows][lane][value].
#pragma once

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/sm90/lane_keys.cuh"

namespace proxyattn::cuda::sm90 {

inline constexpr int kRowGroup = 16;  // rows of a warp

// Floats of a row group in one key tile.
template <int kBlockKeys>
inline constexpr int kGroupFloats = kWarpLanes * LaneBlocks<kBlockKeys>::kCount;

// One lane's values, as one vector.
template <int kCount>
PROXYATTN_DEVICE void store_values(float* to, const float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *to = values[0];
  } else if constexpr (kCount == 2) {
    *reinterpret_cast<float2*>(to) = make_float2(values[0], values[1]);
  } else {
    static_assert(kCount == 4);
    *reinterpret_cast<float4*>(to) = make_float4(values[0], values[1], values[2], values[3]);
  }
}

// Read once.
template <int kCount>
PROXYATTN_DEVICE void load_values(const float* from, float (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = __ldcs(from);
  } else if constexpr (kCount == 2) {
    const float2 v = __ldcs(reinterpret_cast<const float2*>(from));
    values[0] = v.x;
    values[1] = v.y;
  } else {
    static_assert(kCount == 4);
    const float4 v = __ldcs(reinterpret_cast<const float4*>(from));
    values[0] = v.x;
    values[1] = v.y;
    values[2] = v.z;
    values[3] = v.w;
  }
}

}  // namespace proxyattn::cuda::sm90
