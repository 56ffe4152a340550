// The two matrix products of a step, as runs of wgmma over shared-memory tiles.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/attention/sm90/traits.h"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/wgmma.cuh"

namespace proxyattn::cuda::sm90 {

inline constexpr int kDepth = 16;  // of one wgmma

// Descriptor steps, in units of 16 bytes.
PROXYATTN_HOST_DEVICE constexpr uint32_t descriptor_step(int bytes) {
  return static_cast<uint32_t>(bytes) / ptx::kDescriptorUnit;
}

// S[64 x kKeyRows] = Q K^T. Along head_dim a box holds four steps of 32 bytes, then comes the next
// box. Issues only: the caller commits and waits.
template <typename Traits>
PROXYATTN_DEVICE void issue_scores(float (&s)[Traits::kScores], uint64_t query, uint64_t key) {
  constexpr int kStepsPerBox = kTensorBoxColumns / kDepth;
  constexpr int kStepBytes = Traits::kBoxRowBytes / kStepsPerBox;
  PROXYATTN_UNROLL
  for (int i = 0; i < Traits::kHeadDim / kDepth; ++i) {
    const int box = i / kStepsPerBox;
    const uint32_t inside = descriptor_step(i % kStepsPerBox * kStepBytes);
    ptx::Wgmma<typename Traits::Element, Traits::kKeyRows>::ss(
        s, query + inside + descriptor_step(box * Traits::kQueryBoxBytes),
        key + inside + descriptor_step(box * Traits::kKeyBoxBytes), i != 0);
  }
}

// O[64 x head_dim] += P V over the first kKeys keys of a tile, P from registers. Along the keys a
// step is 16 rows of 128 bytes.
template <typename Traits, int kKeys = Traits::kKeyRows>
PROXYATTN_DEVICE void issue_output(float (&o)[Traits::kOutputs],
                                   const uint32_t (&p)[Traits::kProbabilities],
                                   uint64_t value) {
  PROXYATTN_UNROLL
  for (int i = 0; i < kKeys / kDepth; ++i) {
    constexpr int kStepsOfPart = Traits::kPartRows / kDepth;
    const int bytes =
        i / kStepsOfPart * Traits::kPartBytes + i % kStepsOfPart * kDepth * Traits::kBoxRowBytes;
    ptx::Wgmma<typename Traits::Element, Traits::kHeadDim>::rs(o, &p[4 * i],
                                                               value + descriptor_step(bytes), 1);
  }
}

}  // namespace proxyattn::cuda::sm90
