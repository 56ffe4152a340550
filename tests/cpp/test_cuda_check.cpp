// A failed CUDA call is told once, and to nobody else. Without a driver every call fails, and what
// the last error is says nothing; with one, there is no device of this number anywhere.
#include <string>

#include <cuda_runtime_api.h>

#include "proxyattn/error.h"

#include "check.h"
#include "cuda/common/check.h"

namespace proxyattn::cuda {
namespace {

TEST(a_failed_call_is_not_the_last_error_of_the_next) {
  const cudaError_t before = cudaPeekAtLastError();
  std::string message;
  try {
    PROXYATTN_CUDA_CALL("some_op", cudaSetDevice(100000));
  } catch (const CudaError& error) {
    message = error.what();
  }
  CHECK_EQ(message.substr(0, 38), std::string("some_op: cudaSetDevice(100000) failed:"));
  CHECK_EQ(cudaPeekAtLastError(), before);
}

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
