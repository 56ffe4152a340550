#include "cuda/attention/sm80/launch.cuh"

namespace proxyattn::cuda::sm80 {

template void launch_attention<64, DType::kFloat16>(const AttentionParams&, Stream);

}  // namespace proxyattn::cuda::sm80
