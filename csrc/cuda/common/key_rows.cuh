// The keys, or values, of one head: where tiles of them are loaded from.
//
// Rows from `count` on are zeros in shared memory and are not read, whatever lies there.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/common/warp.cuh"
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
  static_assert(PageTable::kNoPage < 0);

  KeyRows<Element> page0;  // its tokens
  int64_t page_stride;
  const PageTable& table;
  int32_t sequence;  // whose pages

  template <typename Loader>
  PROXYATTN_DEVICE void load(uint32_t tile, int first_key, int thread) const {
    constexpr int kParts = Loader::kTileRows / kPartRows;
    static_assert(kParts <= kWarpLanes);
    // Each lane reads the page of a part, all at once.
    const int key = first_key + thread % kParts * kPartRows;
    const int page = key < page0.count ? table.page(sequence, key) : PageTable::kNoPage;
    if (page0.aligned) {
      PROXYATTN_UNROLL
      for (int i = 0; i < kParts; ++i) load_part<Loader, true>(tile, first_key, i, page, thread);
    } else {
      PROXYATTN_NO_UNROLL
      for (int i = 0; i < kParts; ++i) load_part<Loader, false>(tile, first_key, i, page, thread);
    }
  }

 private:
  template <typename Loader, bool kAligned>
  PROXYATTN_DEVICE void load_part(
      uint32_t tile, int first_key, int part, int lane_page, int thread) const {
    const int key = first_key + part * kPartRows;
    const int page = __shfl_sync(kAllLanes, lane_page, part);
    const bool exists = page != PageTable::kNoPage;
    const Element* source =
        page0.first + max(page, 0) * page_stride + table.token_in_page(key) * page0.stride;
    Loader::template Part<kPartRows>::load(Loader::Tile::moved(tile, part * kPartRows, 0), source,
                                           page0.stride, exists ? page0.count - key : 0, kAligned,
                                           thread);
  }
};

}  // namespace proxyattn::cuda
