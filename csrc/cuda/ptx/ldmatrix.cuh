// Loads of four 8 x 8 matrices of 16-bit elements from shared memory into mma fragments.
//
// Lane l names, in `row_address`, the 16 bytes of row l % 8 of matrix l / 8. Register i of lane l
// then holds elements (l / 4, 2 * (l % 4) + {0, 1}) of matrix i; with _trans, those of its
// transpose.
#pragma once

#include <cstdint>

#include "cuda/ptx/address.cuh"

namespace proxyattn::cuda::ptx {

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row_address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&matrices)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row_address)
               : "memory");
}

}  // namespace proxyattn::cuda::ptx
