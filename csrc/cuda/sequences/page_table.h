// Where the keys of packed sequences are: one behind another, or in pages of a cache.
#pragma once

#include <cstdint>

#include "proxyattn/sequences.h"

#include "common/sequence.h"

namespace proxyattn::cuda {

// A token of a [entries, tokens, heads, head_dim] tensor, and of those behind it the ones that
// follow it there.
struct TokenPlace {
  static constexpr int64_t kNowhere = -1;

  int64_t entry;  // batch entry or page; kNowhere: to be read as zeros
  int64_t token;

  PROXYATTN_HOST_DEVICE bool exists() const { return entry != kNowhere; }
};

struct PageTable {
  static constexpr int32_t kNoPage = static_cast<int32_t>(TokenPlace::kNowhere);

  const int32_t* pages = nullptr;  // [sequences, row_pages]; null: keys follow one another
  int64_t row_pages = 0;
  int32_t num_pages = 0;
  int32_t page_shift = 0;  // log2 of a page's tokens

  PageTable() = default;
  explicit PageTable(const PackedSequences& packed)
      : pages(packed.page_table),
        row_pages(packed.table_pages),
        num_pages(static_cast<int32_t>(packed.num_pages)) {
    while (packed.page_len >> page_shift > 1) ++page_shift;
  }

  PROXYATTN_HOST_DEVICE int32_t token_in_page(int32_t key) const {
    return key & ((int32_t{1} << page_shift) - 1);
  }

  // The page with a key of a sequence. What pages a table names is not to be trusted, unlike
  // lengths, which have been cut to what it holds.
  PROXYATTN_HOST_DEVICE int32_t page(int32_t sequence, int32_t key) const {
    const int32_t page = pages[sequence * row_pages + (key >> page_shift)];
    return static_cast<uint32_t>(page) < static_cast<uint32_t>(num_pages) ? page : kNoPage;
  }

  // Of a key, and of those that follow it in its page.
  PROXYATTN_HOST_DEVICE TokenPlace place(const Sequence& sequence, int32_t key) const {
    if (pages == nullptr) return {0, int64_t{sequence.kv_start} + key};
    return {page(sequence.idx, key), token_in_page(key)};
  }
};

}  // namespace proxyattn::cuda
