#include "cuda/attention/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void launch_attention<128, DType::kBFloat16>(const AttentionParams&, Stream);

}  // namespace proxyattn::cuda::sm90
