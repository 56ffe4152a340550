// The keys, or values, of one head: where tiles of them are loaded from.
//
// Rows from `count` on are zeros in shared memory and are not read, whatever lies there.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/sequences/page_table.h"

namespace proxyattn::cuda {

// They follow one another.
template <typename Element>
struct KeyRows {
  const Element* first;  // key 0
  int64_t stride;
  int count;
  bool aligned;

  template <typename Loader>
  PROXYATTN_DEVICE void load(uint32_t tile, int first_key, int thread) const {
    Loader::load(tile, first + first_key * stride, stride, count - first_key, aligned, thread);
  }
};

// They lie in pages. A tile is loaded in parts that no page ends in; keys of a page that there is
// not are zeros.
template <typename Element>
struct PagedKeyRows {
  static constexpr int kPartRows = 16;  // of the smallest page

  KeyRows<Element> page0;  // its tokens
  int64_t page_stride;
  const PageTable& table;
  int32_t sequence;  // whose pages

  template <typename Loader>
  PROXYATTN_DEVICE void load(uint32_t tile, int first_key, int thread) const {
    using Part = typename Loader::template Part<kPartRows>;
    constexpr int kParts = Loader::kTileRows / kPartRows;
    // Before the first copy: each of these reads takes as long as all.
    int pages[kParts];
    PROXYATTN_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int key = first_key + i * kPartRows;
      pages[i] = key < page0.count ? table.page(sequence, key) : PageTable::kNoPage;
    }
    PROXYATTN_UNROLL
    for (int i = 0; i < kParts; ++i) {
      const int key = first_key + i * kPartRows;
      const bool exists = pages[i] != PageTable::kNoPage;
      const Element* source = page0.first + (exists ? pages[i] * page_stride : 0) +
                              table.token_in_page(key) * page0.stride;
      Part::load(Loader::Tile::moved(tile, i * kPartRows, 0), source, page0.stride,
                 exists ? page0.count - key : 0, page0.aligned, thread);
    }
  }
};

}  // namespace proxyattn::cuda
