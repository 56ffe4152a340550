#include "cuda/attention/sm80/launch.cuh"

namespace proxyattn::cuda::sm80 {

template void launch_attention<256, DType::kBFloat16>(const AttentionParams&, Stream);

}  // namespace proxyattn::cuda::sm80
