#include "cuda/needs/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void launch_block_lse<128, DType::kBFloat16>(const NeedParams&, Stream);

}  // namespace proxyattn::cuda::sm90
