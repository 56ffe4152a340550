// Warpgroup matrix products (wgmma, sm_90a) with fp32 accumulators in registers.
//
//   wgmma_ss<Element, N>  D[64 x N] (+)= A[64 x 16] B[16 x N], A and B in shared memory, K-major
//   wgmma_rs<Element, N>  D[64 x N]  += A[64 x 16] B[16 x N], A in registers, B N-major in shared
//
// Accumulator layout of a thread, lane = threadIdx % 32, warp = threadIdx / 32 % 4:
//   d[4 * j + 2 * r + c] is row 16 * warp + lane / 4 + 8 * r, column 8 * j + 2 * (lane % 4) + c.
// Operands in shared memory carry the 128-byte swizzle of the copy engine.
//
// Rules that keep ptxas from serialising: no accumulator in flight across a loop's back edge, and
// nothing but wgmma between fence() and the last product that reads the fenced registers.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx/mbarrier.cuh"

namespace proxyattn::cuda::ptx {

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Tells the compiler that these registers are touched here: reads and writes of them stay on
// their side of the wait or the fence beside the call.
template <int Count>
__device__ __forceinline__ void pin(float (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int Count>
__device__ __forceinline__ void pin(uint32_t (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Shared-memory matrix descriptor, 128-byte swizzle. K-major operands: `leading_bytes` is ignored,
// `stride_bytes` lies between groups of 8 rows. N-major: `leading_bytes` lies between boxes of 64
// columns, `stride_bytes` between groups of 8 rows of K. Addresses step in units of 16 bytes, so
// adding bytes / 16 to a descriptor moves it.
inline constexpr uint32_t kDescriptorUnit = 16;
inline constexpr uint32_t kSwizzleRowGroupBytes = 1024;  // 8 rows of 128 bytes

__device__ __forceinline__ uint64_t matrix_descriptor(const void* shared, uint32_t leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  return ((shared_address(shared) & 0x3FFFFu) / kDescriptorUnit) |
         static_cast<uint64_t>(leading_bytes / kDescriptorUnit) << 16 |
         static_cast<uint64_t>(kSwizzleRowGroupBytes / kDescriptorUnit) << 32 | kSwizzle128;
}

// A descriptor moved by units of 16 bytes. Only the low word moves, which spares the carry.
__device__ __forceinline__ uint64_t move_descriptor(uint64_t descriptor, uint32_t units) {
  constexpr uint64_t kHighWord = 0xFFFFFFFFull << 32;
  return (descriptor & kHighWord) | (static_cast<uint32_t>(descriptor) + units);
}

// Four 8x8 matrices of 16-bit values to shared memory, one row address per lane.
__device__ __forceinline__ void stmatrix_x4(
    uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

// Operand lists for 32, 64 and 128 accumulators.
#define PROXYATTN_ACC4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PROXYATTN_ACC16(d, i)                                               \
  PROXYATTN_ACC4(d, i), PROXYATTN_ACC4(d, i + 4), PROXYATTN_ACC4(d, i + 8), \
      PROXYATTN_ACC4(d, i + 12)
#define PROXYATTN_ACC32(d) PROXYATTN_ACC16(d, 0), PROXYATTN_ACC16(d, 16)
#define PROXYATTN_ACC64(d) PROXYATTN_ACC32(d), PROXYATTN_ACC16(d, 32), PROXYATTN_ACC16(d, 48)
#define PROXYATTN_ACC128(d)                                                                   \
  PROXYATTN_ACC64(d), PROXYATTN_ACC16(d, 64), PROXYATTN_ACC16(d, 80), PROXYATTN_ACC16(d, 96), \
      PROXYATTN_ACC16(d, 112)

#define PROXYATTN_REGS0_31                                                 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PROXYATTN_REGS32_63                                                            \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PROXYATTN_REGS64_127                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, "   \
  "%127"

template <typename Element, int N>
struct Wgmma;

// SS: operands A, B and the accumulate flag follow the accumulators as %K0 to %K2.
// RS: the four registers of A, B and the flag, %K0 to %K5.
#define PROXYATTN_WGMMA(ELEMENT, TYPE, N, COUNT, REGS, ACC, K0, K1, K2, K3, K4, K5)                \
  template <>                                                                                      \
  struct Wgmma<ELEMENT, N> {                                                                       \
    static __device__ __forceinline__ void ss(float (&d)[COUNT],                                   \
                                              uint64_t a,                                          \
                                              uint64_t b,                                          \
                                              int accumulate) {                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #K2                                        \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS \
                   "}, %" #K0 ", %" #K1 ", p, 1, 1, 0, 0;\n}\n"                                    \
                   : ACC(d)                                                                        \
                   : "l"(a), "l"(b), "r"(accumulate));                                             \
    }                                                                                              \
    static __device__ __forceinline__ void rs(float (&d)[COUNT],                                   \
                                              const uint32_t* a,                                   \
                                              uint64_t b,                                          \
                                              int accumulate) {                                    \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #K5                                        \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGS \
                   "}, {%" #K0 ", %" #K1 ", %" #K2 ", %" #K3 "}, %" #K4 ", p, 1, 1, 1;\n}\n"       \
                   : ACC(d)                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));         \
    }                                                                                              \
  };

#define PROXYATTN_WGMMA_TYPE(ELEMENT, TYPE)                                                        \
  PROXYATTN_WGMMA(ELEMENT, TYPE, 64, 32, PROXYATTN_REGS0_31, PROXYATTN_ACC32, 32, 33, 34, 35, 36,  \
                  37)                                                                              \
  PROXYATTN_WGMMA(ELEMENT, TYPE, 128, 64, PROXYATTN_REGS0_31 PROXYATTN_REGS32_63, PROXYATTN_ACC64, \
                  64, 65, 66, 67, 68, 69)                                                          \
  PROXYATTN_WGMMA(ELEMENT, TYPE, 256, 128,                                                         \
                  PROXYATTN_REGS0_31 PROXYATTN_REGS32_63 PROXYATTN_REGS64_127, PROXYATTN_ACC128,   \
                  128, 129, 130, 131, 132, 133)

PROXYATTN_WGMMA_TYPE(__nv_bfloat16, "bf16")
PROXYATTN_WGMMA_TYPE(__half, "f16")

#undef PROXYATTN_WGMMA_TYPE
#undef PROXYATTN_WGMMA
#undef PROXYATTN_REGS0_31
#undef PROXYATTN_REGS32_63
#undef PROXYATTN_REGS64_127
#undef PROXYATTN_ACC4
#undef PROXYATTN_ACC16
#undef PROXYATTN_ACC32
#undef PROXYATTN_ACC64
#undef PROXYATTN_ACC128

}  // namespace proxyattn::cuda::ptx
