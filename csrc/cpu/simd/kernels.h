// The inner loops of the CPU stages, compiled once per instruction family and chosen at run time.
//
// Queries stand side by side in vector lanes: a *panel* is `panel` consecutive query rows, stored
// transposed as [head_dim][panel]. Scores of a panel are [num_keys][panel], so that the softmax
// over keys runs down the columns with no exchange between lanes, and keys and values need no
// transpose.
#pragma once

#include <cstdint>
#include <vector>

#include "proxyattn/types.h"

namespace proxyattn::cpu {

// Keys that one call of a kernel sees at most.
inline constexpr int64_t kMaxTileKeys = 128;
// A multiple of every family's panel.
inline constexpr int64_t kMaxPanel = 32;

struct Kernels {
  const char* family;
  int64_t panel;  // query rows per panel

  // Between an element type and fp32; rounds to nearest even.
  void (*widen)(DType dtype, const void* in, int64_t count, float* out);
  void (*narrow)(DType dtype, const float* in, int64_t count, void* out);

  // Rearranges fp32 values [num_keys][head_dim] for `accumulate`, into kMaxTileKeys * head_dim
  // floats of which it writes those of the keys given.
  void (*pack_values)(const float* values, int64_t num_keys, int64_t head_dim, float* packed);

  // scores[num_keys][panel] = keys[num_keys][head_dim] . queries[head_dim][panel]
  void (*scores)(
      const float* queries, const float* keys, int64_t num_keys, int64_t head_dim, float* scores);

  // Row i sees keys [begin[i], end[i]); the other scores become -inf.
  void (*mask)(const int32_t* begin, const int32_t* end, int64_t num_keys, float* scores);

  // One step of the online softmax of a panel. Scores become exp(score - top), with `top` first
  // raised to the scores' maximum; decay = exp(old top - top) is the factor for what was summed
  // before, and `sum` is brought up to date with it.
  void (*softmax_step)(int64_t num_keys, float* scores, float* top, double* sum, float* decay);

  // out[head_dim][panel] = decay[panel] * out + values^T . probabilities[num_keys][panel], over the
  // first num_keys of the keys that were packed.
  void (*accumulate)(const float* packed_values,
                     const float* probabilities,
                     const float* decay,
                     int64_t num_keys,
                     int64_t head_dim,
                     float* out);

  // For each run of keys_per_block keys and each row of the panel: the largest score and the sum of
  // exp(score - largest), at top[block * row_stride] and sum[block * row_stride].
  void (*block_stats)(const float* scores,
                      int64_t num_keys,
                      int64_t keys_per_block,
                      int64_t row_stride,
                      float* top,
                      float* sum);

  // Turns the statistics of a panel over all its key blocks into log-probabilities (top) and
  // probabilities (sum): largest and total of the block, softmax over all blocks.
  void (*normalize)(int64_t num_blocks, int64_t row_stride, float* top, float* sum);
};

// The fastest table that the running processor supports, unless use_kernels() named another.
const Kernels& kernels();
void use_kernels(const Kernels& chosen);

// All tables that the running processor supports, fastest first.
const std::vector<const Kernels*>& supported_kernels();

}  // namespace proxyattn::cpu
