// Random inputs made on the device, so that a benchmark of 1M tokens starts at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/launch.h"
#include "random.h"

namespace proxyattn::bench {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

__device__ void store(float* to, float value) {
  *to = value;
}
__device__ void store(__half* to, float value) {
  *to = __float2half_rn(value);
}
__device__ void store(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}

template <typename T>
__global__ void fill_normal_kernel(T* to, int64_t count, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += step) {
    store(to + i, normal_at(seed, i));
  }
}

template <typename T>
void fill(void* to, int64_t count, uint64_t seed, Stream stream) {
  const int64_t blocks = min_of(ceil_div<int64_t>(count, kThreads), kMaxBlocks);
  cuda::launch<fill_normal_kernel<T>>("bench", {blocks, 1, 1, kThreads}, stream,
                                      static_cast<T*>(to), count, seed);
}

}  // namespace

void fill_normal_on_device(void* to, int64_t count, DType dtype, uint64_t seed, Stream stream) {
  if (dtype == DType::kBFloat16) return fill<__nv_bfloat16>(to, count, seed, stream);
  if (dtype == DType::kFloat16) return fill<__half>(to, count, seed, stream);
  fill<float>(to, count, seed, stream);
}

#define PROXYATTN_TEXT_OF(x) #x
#define PROXYATTN_TEXT(x) PROXYATTN_TEXT_OF(x)

const char* cuda_compiler() {
  return "nvcc " PROXYATTN_TEXT(__CUDACC_VER_MAJOR__) "." PROXYATTN_TEXT(
      __CUDACC_VER_MINOR__) "." PROXYATTN_TEXT(__CUDACC_VER_BUILD__);
}

}  // namespace proxyattn::bench
