// Which keys a query sees: the rule of causal attention and of its windows, stated once. Host and
// device code ask it, with 64 and with 32 bits.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace proxyattn {

template <typename Int>
struct KeyBlocks {
  Int first;
  Int end;
};

// What neighbouring queries see, the rows of a tile: row r the keys [begin(r), end(r)), neither of
// which ever falls from one row to the next.
template <typename Int>
struct RowKeys {
  Int first_begin;  // of row 0, before it is cut to the keys there are; a row's is one further
  Int first_end;    // likewise
  Int num_keys;

  PROXYATTN_HOST_DEVICE Int begin(Int row) const { return cut(first_begin + row); }
  PROXYATTN_HOST_DEVICE Int end(Int row) const { return cut(first_end + row); }

  // The same in 32 bits, for up to 2^30 rows.
  PROXYATTN_HOST_DEVICE RowKeys<int32_t> narrow() const {
    constexpr Int kFar = Int{1} << 30;
    return {static_cast<int32_t>(max_of(first_begin, -kFar)),
            static_cast<int32_t>(max_of(first_end, -kFar)), static_cast<int32_t>(num_keys)};
  }

  // Those of `block` keys with a key that one of rows 0 to last_row sees.
  PROXYATTN_HOST_DEVICE KeyBlocks<Int> blocks(Int last_row, Int block) const {
    const Int end_key = end(last_row);
    const Int end_block = ceil_div(end_key, block);
    return {begin(0) < end_key ? begin(0) / block : end_block, end_block};
  }

 private:
  PROXYATTN_HOST_DEVICE Int cut(Int key) const { return min_of(max_of(key, Int{0}), num_keys); }
};

// Positions lie between -kFar and kFar.
template <typename Int>
class Visibility {
 public:
  static constexpr Int kFar = Int{1} << (8 * sizeof(Int) - 2);

  Visibility() = default;
  // Where `causal`, a query sees no key behind its own position, and of those up to it the last
  // `window`; 0: all.
  PROXYATTN_HOST_DEVICE Visibility(bool causal, int64_t window)
      : causal_(causal), window_(0 < window && window < kFar ? static_cast<Int>(window) : kFar) {}

  PROXYATTN_HOST_DEVICE bool has_window() const { return window_ < kFar; }

  // Of queries from position `first` on.
  PROXYATTN_HOST_DEVICE RowKeys<Int> rows(Int first, Int num_keys) const {
    if (!causal_) return {-kFar, num_keys, num_keys};
    return {static_cast<Int>(first + 1 - window_), static_cast<Int>(first + 1), num_keys};
  }

 private:
  bool causal_;
  Int window_;
};

}  // namespace proxyattn
