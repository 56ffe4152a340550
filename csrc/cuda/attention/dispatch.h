// What each kernel family offers to the dispatcher, in terms the host compiler understands.
#pragma once

#include <cstdint>

#include "proxyattn/attention.h"
#include "proxyattn/types.h"

namespace proxyattn::cuda::sm80 {

// Defined, one instance a file, by the family's hdim<head_dim>_<dtype>.cu.
template <int kHeadDim, DType kDType>
void launch_attention(const AttentionParams& params, Stream stream);

}  // namespace proxyattn::cuda::sm80

namespace proxyattn::cuda::sm90 {

template <int kHeadDim, DType kDType>
void launch_attention(const AttentionParams& params, Stream stream);

// True if the copy engine can address the call's tensors and the family's tiles make up its blocks.
bool fits(const AttentionParams& params);
int64_t workspace_bytes(const AttentionParams& params);

}  // namespace proxyattn::cuda::sm90
