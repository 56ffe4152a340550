// Tensor maps: how the copy engine sees a [batch, token, head, head_dim] tensor.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "proxyattn/types.h"

namespace proxyattn::cuda {

inline constexpr int kTensorBoxColumns = 64;  // 128 bytes: the width of the swizzle

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

// Whether the copy engine can address the tensor: base and strides of 16 bytes, strides within 40
// bits.
bool tensor_map_fits(const void* data, const TensorSizes& sizes, const TokenStrides& strides);

// Dimensions, innermost first: 64 columns, tokens, groups of 64 columns, heads, batch.
CUtensorMap make_tensor_map(const char* op,
                            const void* data,
                            DType dtype,
                            const TensorSizes& sizes,
                            const TokenStrides& strides,
                            const TensorBox& box);

// A tile of tokens in runs: `runs` runs of `run_tokens` neighbours. It may begin at the first
// `starts` tokens of a run.
struct RunBox {
  int run_tokens;
  int runs;
  int starts = 1;
};

// Dimensions, innermost first: columns, runs, tokens of a run, heads, batch; boxes are 64 columns
// wide. A last run that is not whole is left out. Where tiles begin inside of runs, the dimension
// of a run's tokens goes on into the next one: such a map leads past the last token, and whoever
// loads through it keeps to tiles that the tensor holds.
CUtensorMap make_run_map(const char* op,
                         const void* data,
                         DType dtype,
                         const TensorSizes& sizes,
                         const TokenStrides& strides,
                         const RunBox& box);

}  // namespace proxyattn::cuda
