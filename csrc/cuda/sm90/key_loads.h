// Where key tiles come from: the coordinates of their loads.
#pragma once

#include "common/math.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

// Neighbouring keys that a lane holds together, see key_maps.h.
inline constexpr int kRunKeys = 16;
inline constexpr int kTileRuns = kLogitKeys / kRunKeys;

// Of a token among runs that begin at multiples of their length.
struct RunPlace {
  int run;
  int token;  // in the run

  explicit PROXYATTN_HOST_DEVICE RunPlace(int tensor_token)
      : run(tensor_token / kRunKeys), token(tensor_token % kRunKeys) {}
};

// A tile of keys in pages. A load takes what one page has of it, 64 columns at a time; loads are
// numbered piece by piece, and a warp's lanes ask for one each.
struct PageLoads {
  int piece_shift;  // log2 of the keys of a piece

  // log2_page counts the keys of a page.
  static PROXYATTN_HOST_DEVICE PageLoads of(int log2_page) {
    constexpr int kTileShift = 7;
    static_assert(1 << kTileShift == kLogitKeys);
    return {min_of(log2_page, kTileShift)};
  }

  PROXYATTN_HOST_DEVICE int piece_keys() const { return 1 << piece_shift; }
  // In the tile; the tile's end or behind it: there is no such load. `boxes` of 64 columns hold a
  // key.
  PROXYATTN_HOST_DEVICE int first_key(int load, int boxes) const {
    return load / boxes << piece_shift;
  }
  static PROXYATTN_HOST_DEVICE int box(int load, int boxes) { return load % boxes; }
};

}  // namespace proxyattn::cuda::sm90
