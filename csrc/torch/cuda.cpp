// The CUDA backend: the only file that needs torch's CUDA headers.
#include <c10/cuda/CUDAStream.h>

#include "backend.h"

namespace proxyattn::binding {
namespace {

const Backend kCudaBackend = {
    [](const at::Tensor& tensor) -> Stream {
      return c10::cuda::getCurrentCUDAStream(tensor.get_device()).stream();
    },
    cuda::pool_heads,
    cuda::score_blocks_workspace_bytes,
    cuda::score_blocks,
    cuda::estimate_needs_workspace_bytes,
    cuda::estimate_needs,
    cuda::select_blocks,
    cuda::block_sparse_attention_workspace_bytes,
    cuda::block_sparse_attention,
    cuda::choose_blocks_workspace_bytes,
    cuda::choose_blocks,
    cuda::proxy_attention_workspace_bytes,
    cuda::proxy_attention,
};

[[maybe_unused]] const bool kRegistered = (set_cuda_backend(&kCudaBackend), true);

}  // namespace
}  // namespace proxyattn::binding
