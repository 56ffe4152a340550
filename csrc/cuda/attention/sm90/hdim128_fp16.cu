#include "cuda/attention/sm90/launch.cuh"

namespace proxyattn::cuda::sm90 {

template void run<128, __half>(const AttentionParams&, Stream);

}  // namespace proxyattn::cuda::sm90
