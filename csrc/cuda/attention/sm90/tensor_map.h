// Tensor maps: how the copy engine sees a [batch, token, head, head_dim] tensor.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "proxyattn/attention.h"
#include "proxyattn/types.h"

namespace proxyattn::cuda::sm90 {

struct TensorSizes {
  int64_t tokens;
  int64_t head_dim;
  int64_t heads;
  int64_t batch;
};

// The tile of one load or store: `rows` tokens of `boxes` times 64 columns.
struct TensorBox {
  int rows;
  int boxes;
};

// Dimensions, innermost first: 64 columns, tokens, groups of 64 columns, heads, batch.
CUtensorMap make_tensor_map(const char* op,
                            const void* data,
                            DType dtype,
                            const TensorSizes& sizes,
                            const TokenStrides& strides,
                            const TensorBox& box);

// True if q, k, v and out can be addressed so: 16-byte bases and strides, sizes and coordinates of
// 32 bits; and if the blocks are made of this family's tiles.
bool fits(const AttentionParams& params);

// Bytes of scratch: the tile counter.
inline constexpr int64_t kWorkspaceBytes = sizeof(int32_t);

}  // namespace proxyattn::cuda::sm90
