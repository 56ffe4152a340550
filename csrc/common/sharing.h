// Which query heads can be worked on together.
#pragma once

#include <cstdint>
#include <numeric>

#include "proxyattn/attention.h"

namespace proxyattn {

// Consecutive query heads that read the same keys and the same list of key blocks; heads fall into
// groups of so many, whichever of kv_heads and list_heads divides the other, or neither.
inline int64_t heads_sharing_list(const AttentionParams& p) {
  const int64_t heads_per_kv = p.q_heads / p.kv_heads;
  return p.indices == nullptr ? heads_per_kv : std::gcd(heads_per_kv, p.q_heads / p.list_heads);
}

}  // namespace proxyattn
