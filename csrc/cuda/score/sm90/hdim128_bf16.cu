#include "cuda/score/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void launch_score<128, DType::kBFloat16>(const ScoreParams&, Stream);

}  // namespace proxyattn::cuda::sm90
