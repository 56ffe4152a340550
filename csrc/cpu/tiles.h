// Moving rows of q, k and v tensors into the forms that the kernels of simd/kernels.h read.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "common/tokens.h"
#include "cpu/simd/kernels.h"

namespace proxyattn::cpu {

// Rows of one head: row i begins row_stride * i elements behind `first`.
struct HeadRows {
  const void* first;
  int64_t row_stride;
  DType dtype;
};

// Rows of one head of a [batch, token, head, head_dim] tensor, from token `token` on, every
// `step`-th.
inline HeadRows head_rows(const void* tensor,
                          const TokenStrides& strides,
                          DType dtype,
                          int64_t batch,
                          int64_t head,
                          int64_t token,
                          int64_t step = 1) {
  const int64_t offset = batch * strides.batch + token * strides.token + head * strides.head;
  return {element_at(tensor, offset, dtype), strides.token * step, dtype};
}

// tile[num_rows][head_dim] = rows, in fp32.
void load_rows(
    const Kernels& kernels, const HeadRows& rows, int64_t num_rows, int64_t head_dim, float* tile);

// panels[ceil(num_rows / panel)][head_dim][panel] = scale * rows; lanes past the last row are 0.
void load_panels(const Kernels& kernels,
                 const HeadRows& rows,
                 int64_t num_rows,
                 int64_t head_dim,
                 float scale,
                 float* panels);

}  // namespace proxyattn::cpu
