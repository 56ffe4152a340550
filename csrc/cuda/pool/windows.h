// Which tokens make up a window of the proxies, in a batch and among packed sequences.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/sequences/page_table.h"

namespace proxyattn::cuda {

struct Window {
  // In place of a number of tokens: there is no such window, and neither any behind it.
  static constexpr int kNoMore = -1;

  TokenPlace first;
  int num_tokens;  // 0: there is no such window
};

// Windows of packed queries are numbered by query blocks, those of a block's queries one after
// another; windows of packed keys by units, as Sequence says. Some of a sequence's last block or
// unit do not exist. A window lies in one page: both are powers of two from a sequence's first key.
struct PackedWindows {
  SequenceTable table;
  PageTable pages;
  int stride;         // tokens from one window to the next
  int window_tokens;  // that are looked at; the last window of a sequence may have fewer
  int block_windows;  // of a query block

  PROXYATTN_HOST_DEVICE Window of_queries(int64_t window) const {
    const int64_t block = window / block_windows;
    const int32_t owner = table.block_sequence[block];
    if (owner >= table.count) return {{}, Window::kNoMore};
    const Sequence& s = table.sequences[owner];
    const int64_t first = (window - int64_t{s.first_q_block} * block_windows) * stride;
    return {{0, s.q_start + first}, num_tokens(first, s.q_len)};
  }

  PROXYATTN_HOST_DEVICE Window of_keys(int64_t window) const {
    const int32_t owner = table.unit_sequence[window / kWindowUnit];
    if (owner >= table.count) return {{}, Window::kNoMore};
    const Sequence& s = table.sequences[owner];
    const int64_t first = (window - s.first_key_unit * kWindowUnit) * stride;
    if (first >= s.kv_len) return {{}, 0};
    return {pages.place(s, static_cast<int32_t>(first)), num_tokens(first, s.kv_len)};
  }

 private:
  PROXYATTN_HOST_DEVICE int num_tokens(int64_t first, int64_t end) const {
    return static_cast<int>(max_of<int64_t>(0, min_of<int64_t>(window_tokens, end - first)));
  }
};

}  // namespace proxyattn::cuda
