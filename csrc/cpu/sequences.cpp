#include "cpu/sequences.h"

#include <cstring>

#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace proxyattn::cpu {

void gather_pages(const PackedSequences& packed,
                  const Sequence& sequence,
                  const Gather& gather,
                  void* tokens) {
  const auto row_bytes = static_cast<std::size_t>(gather.head_dim * element_bytes(gather.dtype));
  const auto gather_page = [&](int64_t page, int) {
    const int64_t first = page * packed.page_len;
    const int64_t end = min_of<int64_t>(first + packed.page_len, sequence.kv_len);
    const int64_t id = cut_page(packed, sequence.idx, page);
    for (int64_t row = first * gather.heads; row < end * gather.heads; ++row) {
      void* const to = element_at(tokens, row * gather.head_dim, gather.dtype);
      if (id < 0) {
        std::memset(to, 0, row_bytes);
        continue;
      }
      const HeadRows from = head_rows(gather.pages, gather.strides, gather.dtype, id,
                                      row % gather.heads, row / gather.heads - first);
      std::memcpy(to, from.first, row_bytes);
    }
  };
  const double work =
      static_cast<double>(sequence.kv_len) * static_cast<double>(gather.heads * gather.head_dim);
  parallel_for(ceil_div<int64_t>(sequence.kv_len, packed.page_len), num_workers(work), gather_page);
}

}  // namespace proxyattn::cpu
