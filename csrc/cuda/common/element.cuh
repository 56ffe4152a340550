// The CUDA type of a 16-bit element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "proxyattn/types.h"

namespace proxyattn::cuda {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct ElementOf<DType::kFloat16> {
  using Type = __half;
};

}  // namespace proxyattn::cuda
