#include "busy.h"
#include "cuda/common/launch.h"

namespace proxyattn::bench {
namespace {

__global__ void wait_kernel(int64_t cycles) {
  const int64_t begin = clock64();
  while (clock64() - begin < cycles) {
  }
}

}  // namespace

void keep_busy(int64_t cycles, Stream stream) {
  cuda::launch<wait_kernel>("bench", {1, 1, 1, 1}, stream, cycles);
}

}  // namespace proxyattn::bench
