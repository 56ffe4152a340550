// The threads of a warp.
#pragma once

#include "cuda/common/macros.cuh"

namespace proxyattn::cuda {

inline constexpr int kWarpLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;  // a mask of all of them

PROXYATTN_DEVICE int warp_lane() {
  return static_cast<int>(threadIdx.x) % kWarpLanes;
}

// True in the one thread that acts for its warp.
PROXYATTN_DEVICE bool leads_warp() {
  return warp_lane() == 0;
}

}  // namespace proxyattn::cuda
