// Warp matrix product d[16 x 8] += a[16 x 16] b[16 x 8], 16-bit factors, fp32 sums (sm_80).
//
// With g = lane / 4 and t = lane % 4 a thread holds
//   a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9
//   b0, b1:  rows 2t, 2t + 1 and 2t + 8, 2t + 9; column g
//   d[2r + c]: row g + 8r, column 2t + c
// Pairs lie in one register, the lower index in the lower half.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace proxyattn::cuda::ptx {

template <typename Element>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4],
                                            const uint32_t (&a)[4],
                                            uint32_t b0,
                                            uint32_t b1);

template <>
__device__ __forceinline__ void mma_16x8x16<__nv_bfloat16>(float (&d)[4],
                                                           const uint32_t (&a)[4],
                                                           uint32_t b0,
                                                           uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_16x8x16<__half>(float (&d)[4],
                                                    const uint32_t (&a)[4],
                                                    uint32_t b0,
                                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace proxyattn::cuda::ptx
