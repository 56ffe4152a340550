#include "cuda/attention/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void run<256, __nv_bfloat16>(const AttentionParams&, Stream);

}  // namespace proxyattn::cuda::sm90
