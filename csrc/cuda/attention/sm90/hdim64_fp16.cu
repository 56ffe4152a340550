#include "cuda/attention/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void launch_attention<64, DType::kFloat16>(const AttentionParams&, Stream);

}  // namespace proxyattn::cuda::sm90
