// What each kernel family offers to estimate_needs, in terms the host compiler understands. The
// parameters have been validated, and the settings alone don't decide what heads need.
#pragma once

#include <cstdint>

#include "proxyattn/needs.h"
#include "proxyattn/types.h"

namespace proxyattn::cuda {

// From NeedLayout::block_lse to budgets or shares; every device.
void launch_conclude(const NeedParams& params, Stream stream);
// Where no head's attention decides: that budget, of packed sequences no more than a sequence's key
// blocks, or shares of nothing, which are NaN.
void launch_trivial(const NeedParams& params, int32_t budget, Stream stream);

}  // namespace proxyattn::cuda

// Each fills NeedLayout::block_lse.
namespace proxyattn::cuda::sm80 {

void launch_block_lse(const NeedParams& params, Stream stream);

}  // namespace proxyattn::cuda::sm80

namespace proxyattn::cuda::sm90 {

// Defined, one instance a file, by the family's hdim<head_dim>_<dtype>.cu.
template <int kHeadDim, DType kDType>
void launch_block_lse(const NeedParams& params, Stream stream);

// True if the copy engine can address the call's tensors.
bool block_lse_fits(const NeedParams& params);

}  // namespace proxyattn::cuda::sm90
