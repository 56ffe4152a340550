#include "cuda/score/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void launch_score<64, DType::kFloat16>(const ScoreParams&, Stream);

}  // namespace proxyattn::cuda::sm90
