// Which keys the rows of one query tile can see: causal, bottom-right aligned, and cut at kv_len.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/common/macros.cuh"

namespace proxyattn::cuda {

// Row r of the tile sees keys [0, limit(r)).
struct KeyMask {
  int first_limit;  // causal: position of row 0, plus one; otherwise kv_len
  int kv_len;

  PROXYATTN_DEVICE KeyMask(bool causal, int64_t first_position, int64_t kv_len)
      : first_limit(static_cast<int>(causal ? first_position + 1 : kv_len)),
        kv_len(static_cast<int>(kv_len)) {}

  PROXYATTN_DEVICE int limit(int row) const { return min_of(first_limit + row, kv_len); }

  // False when every row sees all of keys [first_key, first_key + num_keys).
  PROXYATTN_DEVICE bool cuts(int first_key, int num_keys) const {
    return first_key + num_keys > limit(0);
  }
};

}  // namespace proxyattn::cuda
