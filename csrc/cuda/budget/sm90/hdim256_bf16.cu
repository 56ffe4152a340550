#include "cuda/budget/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void launch_block_lse<256, DType::kBFloat16>(const BudgetParams&, Stream);

}  // namespace proxyattn::cuda::sm90
