#include "cpu/tiles.h"

#include <algorithm>

#include "common/math.h"

namespace proxyattn::cpu {

void load_rows(
    const Kernels& kernels, const HeadRows& rows, int64_t num_rows, int64_t head_dim, float* tile) {
  for (int64_t i = 0; i < num_rows; ++i) {
    const void* row = element_at(rows.first, i * rows.row_stride, rows.dtype);
    kernels.widen(rows.dtype, row, head_dim, tile + i * head_dim);
  }
}

void load_panels(const Kernels& kernels,
                 const HeadRows& rows,
                 int64_t num_rows,
                 int64_t head_dim,
                 float scale,
                 float* panels) {
  const int64_t padded_rows = round_up(num_rows, kernels.panel);
  float row[kMaxHeadDim];
  for (int64_t i = 0; i < padded_rows; ++i) {
    if (i < num_rows) {
      const void* from = element_at(rows.first, i * rows.row_stride, rows.dtype);
      kernels.widen(rows.dtype, from, head_dim, row);
    } else {
      std::fill_n(row, head_dim, 0.0f);
    }
    float* lane = panels + i / kernels.panel * head_dim * kernels.panel + i % kernels.panel;
    for (int64_t d = 0; d < head_dim; ++d) lane[d * kernels.panel] = scale * row[d];
  }
}

}  // namespace proxyattn::cpu
