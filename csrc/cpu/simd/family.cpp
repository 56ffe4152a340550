// The kernels of one instruction family: compiled several times with different flags, each time
// with PROXYATTN_FAMILY naming the result. No function here may have external linkage but the
// table.
//
// Both products, scores and accumulate, are one loop: kRows rows of the left matrix times one panel
// of the right one, 2 * kRows vectors of sums in registers, each summed in order of the inner
// dimension. So no result depends on which rows are worked on together.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/simd/kernels.h"
#include "cpu/simd/vec.h"

#ifndef __F16C__
#include "common/half.h"
#endif

#define PROXYATTN_JOIN_(a, b) a##b
#define PROXYATTN_JOIN(a, b) PROXYATTN_JOIN_(a, b)
#define PROXYATTN_STRING_(a) #a
#define PROXYATTN_STRING(a) PROXYATTN_STRING_(a)

namespace proxyattn::cpu {
namespace {

constexpr int64_t kPanel = 2 * kLanes;
static_assert(kMaxPanel % kPanel == 0);

// Rows per product: as many sums as hide the latency of the multiply-adds and leave registers for
// the operands, 16 registers in all but 32 with AVX-512.
#ifdef __AVX512F__
constexpr int kRows = 8;
#else
constexpr int kRows = 6;
#endif

// ---- element types

void widen_bf16(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

void narrow_bf16(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, in + i, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40u;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
  }
}

#ifdef __F16C__
void widen_fp16(const uint16_t* in, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m128i halves;
    std::memcpy(&halves, in + i, sizeof(halves));
    const __m256 floats = _mm256_cvtph_ps(halves);
    std::memcpy(out + i, &floats, sizeof(floats));
  }
  for (; i < count; ++i) out[i] = _cvtsh_ss(in[i]);
}

void narrow_fp16(const float* in, int64_t count, uint16_t* out) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256 floats;
    std::memcpy(&floats, in + i, sizeof(floats));
    const __m128i halves = _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(out + i, &halves, sizeof(halves));
  }
  for (; i < count; ++i) out[i] = _cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT);
}
#else
void widen_fp16(const uint16_t* in, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Float16{in[i]}.to_float();
}

void narrow_fp16(const float* in, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = Float16::from_float(in[i]).bits;
}
#endif

void widen(DType dtype, const void* in, int64_t count, float* out) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out, in, static_cast<std::size_t>(count) * sizeof(float));
      break;
    case DType::kFloat16:
      widen_fp16(static_cast<const uint16_t*>(in), count, out);
      break;
    case DType::kBFloat16:
      widen_bf16(static_cast<const uint16_t*>(in), count, out);
      break;
  }
}

void narrow(DType dtype, const float* in, int64_t count, void* out) {
  switch (dtype) {
    case DType::kFloat32:
      std::memcpy(out, in, static_cast<std::size_t>(count) * sizeof(float));
      break;
    case DType::kFloat16:
      narrow_fp16(in, count, static_cast<uint16_t*>(out));
      break;
    case DType::kBFloat16:
      narrow_bf16(in, count, static_cast<uint16_t*>(out));
      break;
  }
}

// ---- products

// sums[r] = sum over i of left[r * row_step + i * inner_step] * right[i][panel]
template <int kCount>
PROXYATTN_INLINE void product(const float* left,
                              int64_t row_step,
                              int64_t inner_step,
                              const float* right,
                              int64_t inner,
                              Vec (&sums)[kCount][2]) {
  for (auto& sum : sums) sum[0] = sum[1] = Vec{};
  for (int64_t i = 0; i < inner; ++i) {
    const Vec right0 = load(right + i * kPanel);
    const Vec right1 = load(right + i * kPanel + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const float factor = left[r * row_step + i * inner_step];
      sums[r][0] += factor * right0;
      sums[r][1] += factor * right1;
    }
  }
}

// A score is added up from sums over kChunk dimensions, which have half the rounding error of one
// long sum at head_dim 256 and take no more time.
template <int kCount>
void score_rows(const float* queries, const float* keys, int64_t head_dim, float* scores) {
  constexpr int64_t kChunk = 64;
  for (int64_t d = 0; d < head_dim; d += kChunk) {
    const int64_t chunk = head_dim - d < kChunk ? head_dim - d : kChunk;
    Vec sums[kCount][2];
    product<kCount>(keys + d, head_dim, 1, queries + d * kPanel, chunk, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      float* const row = scores + r * kPanel;
      store(row, d == 0 ? sums[r][0] : load(row) + sums[r][0]);
      store(row + kLanes, d == 0 ? sums[r][1] : load(row + kLanes) + sums[r][1]);
    }
  }
}

template <int kCount>
void accumulate_rows(const float* packed_values,
                     const float* probabilities,
                     const float* decay,
                     int64_t num_keys,
                     float* out) {
  Vec sums[kCount][2];
  product<kCount>(packed_values, 1, kCount, probabilities, num_keys, sums);
  const Vec decay0 = load(decay);
  const Vec decay1 = load(decay + kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
    float* row = out + r * kPanel;
    store(row, load(row) * decay0 + sums[r][0]);
    store(row + kLanes, load(row + kLanes) * decay1 + sums[r][1]);
  }
}

// Calls function with `count` as a constant; count is in [0, kLimit], and 0 calls nothing.
template <int kLimit, typename Function>
PROXYATTN_INLINE void with_count(int64_t count, const Function& function) {
  if constexpr (kLimit > 0) {
    if (count == kLimit) {
      function(std::integral_constant<int, kLimit>{});
    } else {
      with_count<kLimit - 1>(count, function);
    }
  }
}

void scores(
    const float* queries, const float* keys, int64_t num_keys, int64_t head_dim, float* out) {
  int64_t key = 0;
  for (; key + kRows <= num_keys; key += kRows) {
    score_rows<kRows>(queries, keys + key * head_dim, head_dim, out + key * kPanel);
  }
  with_count<kRows - 1>(num_keys - key, [&](auto count) {
    score_rows<count>(queries, keys + key * head_dim, head_dim, out + key * kPanel);
  });
}

// Columns in groups of kRows, each group [kMaxTileKeys][group size]: the place of a value does not
// depend on how many keys there are.
template <int kCount>
void pack_columns(const float* values, int64_t num_keys, int64_t head_dim, float* group) {
  for (int64_t key = 0; key < num_keys; ++key) {
    std::memcpy(group + key * kCount, values + key * head_dim, kCount * sizeof(float));
  }
}

void pack_values(const float* values, int64_t num_keys, int64_t head_dim, float* packed) {
  int64_t d = 0;
  for (; d + kRows <= head_dim; d += kRows) {
    pack_columns<kRows>(values + d, num_keys, head_dim, packed + d * kMaxTileKeys);
  }
  with_count<kRows - 1>(head_dim - d, [&](auto count) {
    pack_columns<count>(values + d, num_keys, head_dim, packed + d * kMaxTileKeys);
  });
}

void accumulate(const float* packed_values,
                const float* probabilities,
                const float* decay,
                int64_t num_keys,
                int64_t head_dim,
                float* out) {
  int64_t d = 0;
  for (; d + kRows <= head_dim; d += kRows) {
    accumulate_rows<kRows>(packed_values + d * kMaxTileKeys, probabilities, decay, num_keys,
                           out + d * kPanel);
  }
  with_count<kRows - 1>(head_dim - d, [&](auto count) {
    accumulate_rows<count>(packed_values + d * kMaxTileKeys, probabilities, decay, num_keys,
                           out + d * kPanel);
  });
}

// ---- softmax

// What a row's exponentials are taken relative to: its largest score, but 0 for a row that sees
// nothing, where -inf would turn -inf - -inf into NaN.
PROXYATTN_INLINE Vec reference_of(Vec top) {
  return top == -__builtin_inff() ? Vec{} : top;
}

void mask(const int32_t* begin, const int32_t* end, int64_t num_keys, float* scores) {
  const Vec minus_inf = splat(-__builtin_inff());
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const IntVec first = load(begin + half);
    const IntVec behind = load(end + half);
    for (int64_t key = 0; key < num_keys; ++key) {
      float* at = scores + key * kPanel + half;
      const auto at_key = static_cast<int32_t>(key);
      store(at, (first <= at_key) & (at_key < behind) ? load(at) : minus_inf);
    }
  }
}

void softmax_step(int64_t num_keys, float* scores, float* top, double* sum, float* decay) {
  float step_sum[kPanel];
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    float* const column = scores + half;
    const Vec old_top = load(top + half);
    Vec new_top = old_top;
    for (int64_t key = 0; key < num_keys; ++key) {
      new_top = max(load(column + key * kPanel), new_top);
    }
    const Vec reference = reference_of(new_top);
    Vec total{};
    for (int64_t key = 0; key < num_keys; ++key) {
      const Vec p = exp(load(column + key * kPanel) - reference);
      store(column + key * kPanel, p);
      total += p;
    }
    store(step_sum + half, total);
    store(decay + half, exp(old_top - reference));
    store(top + half, new_top);
  }
  for (int64_t row = 0; row < kPanel; ++row) {
    sum[row] = sum[row] * static_cast<double>(decay[row]) + static_cast<double>(step_sum[row]);
  }
}

void block_stats(const float* scores,
                 int64_t num_keys,
                 int64_t keys_per_block,
                 int64_t row_stride,
                 float* top,
                 float* sum) {
  for (int64_t begin = 0; begin < num_keys; begin += keys_per_block) {
    const int64_t end = begin + keys_per_block < num_keys ? begin + keys_per_block : num_keys;
    for (int64_t half = 0; half < kPanel; half += kLanes) {
      const float* const column = scores + half;
      Vec largest = splat(-__builtin_inff());
      for (int64_t key = begin; key < end; ++key) {
        largest = max(load(column + key * kPanel), largest);
      }
      const Vec reference = reference_of(largest);
      Vec total{};
      for (int64_t key = begin; key < end; ++key) {
        total += exp(load(column + key * kPanel) - reference);
      }
      store(top + half, largest);
      store(sum + half, total);
    }
    top += row_stride;
    sum += row_stride;
  }
}

void normalize(int64_t num_blocks, int64_t row_stride, float* top, float* sum) {
  double total[kPanel] = {};
  float largest[kPanel];
  float log_total[kPanel];
  float inverse[kPanel];
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    Vec row_top = splat(-__builtin_inff());
    for (int64_t n = 0; n < num_blocks; ++n) {
      row_top = max(load(top + n * row_stride + half), row_top);
    }
    store(largest + half, row_top);
    for (int64_t n = 0; n < num_blocks; ++n) {
      float part[kLanes];
      const int64_t at = n * row_stride + half;
      store(part, load(sum + at) * exp(load(top + at) - row_top));
      for (int64_t i = 0; i < kLanes; ++i) total[half + i] += static_cast<double>(part[i]);
    }
  }
  for (int64_t row = 0; row < kPanel; ++row) {
    log_total[row] = static_cast<float>(__builtin_log(total[row]));
    inverse[row] = static_cast<float>(1.0 / total[row]);
  }
  for (int64_t half = 0; half < kPanel; half += kLanes) {
    const Vec row_top = load(largest + half);
    for (int64_t n = 0; n < num_blocks; ++n) {
      const int64_t at = n * row_stride + half;
      const Vec below_top = load(top + at) - row_top;
      store(sum + at, load(sum + at) * exp(below_top) * load(inverse + half));
      store(top + at, below_top - load(log_total + half));
    }
  }
}

}  // namespace

extern const Kernels PROXYATTN_JOIN(kKernels_, PROXYATTN_FAMILY);
const Kernels PROXYATTN_JOIN(kKernels_, PROXYATTN_FAMILY) = {
    PROXYATTN_STRING(PROXYATTN_FAMILY),
    kPanel,
    widen,
    narrow,
    pack_values,
    scores,
    mask,
    softmax_step,
    accumulate,
    block_stats,
    normalize,
};

}  // namespace proxyattn::cpu
