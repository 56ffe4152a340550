// Where the copy engine finds keys and values: in a batch entry, among packed ones, or in pages.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/key_order.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/common/macros.cuh"

namespace proxyattn::cuda::sm90 {

// The keys of a query tile. What is known of them stays in shared memory: a producer has few
// registers and much to remember.
struct KeyPlace {
  const Problem& p;
  const KeyOwner& owner;

  PROXYATTN_DEVICE bool is_paged() const { return p.pages.table != nullptr; }

  // Where a tile's values end before its rows do, other sequences' follow, or what a page has been
  // left with: whatever that is, it would meet weights of zero.
  template <int kRows>
  PROXYATTN_DEVICE bool has_tail(int part) const {
    return p.packed.count > 0 && part * kRows < owner.kv_len && (part + 1) * kRows > owner.kv_len;
  }

  // The page that holds a key; a table is not to be trusted, and what it should not say is no page.
  PROXYATTN_DEVICE int page(int key) const {
    if (key >= owner.kv_len) return p.pages.num_pages;
    const int64_t row = static_cast<int64_t>(owner.batch) * p.pages.table_pages;
    const int page = __ldg(p.pages.table + row + (key >> p.pages.page_shift));
    return static_cast<unsigned>(page) < static_cast<unsigned>(p.pages.num_pages)
               ? page
               : p.pages.num_pages;
  }
  PROXYATTN_DEVICE int token_in_page(int key) const {
    return key & ((1 << p.pages.page_shift) - 1);
  }

  // Of keys that follow one another. Behind the last one the copy engine has zeros.
  PROXYATTN_DEVICE int token(int key) const {
    return key < owner.kv_len ? owner.kv_start + key : p.kv_tokens;
  }
};

}  // namespace proxyattn::cuda::sm90
