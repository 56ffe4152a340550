#include "backend.h"

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include "proxyattn/device.h"

namespace proxyattn::binding {
namespace {

// The CPU kernels run on as many threads as torch's own.
Stream begin_cpu(const at::Tensor&) {
  cpu::set_num_threads(at::get_num_threads());
  return nullptr;
}

const Backend kCpuBackend = {
    begin_cpu,
    [](const PoolParams& p, Stream) { cpu::pool_heads(p); },
    cpu::score_blocks_workspace_bytes,
    [](const ScoreParams& p, Stream) { cpu::score_blocks(p); },
    cpu::estimate_needs_workspace_bytes,
    [](const NeedParams& p, Stream) { cpu::estimate_needs(p); },
    [](const SelectParams& p, Stream) { cpu::select_blocks(p); },
    cpu::block_sparse_attention_workspace_bytes,
    [](const AttentionParams& p, Stream) { cpu::block_sparse_attention(p); },
    cpu::choose_blocks_workspace_bytes,
    [](const PipelineParams& p, Stream) { cpu::choose_blocks(p); },
    cpu::proxy_attention_workspace_bytes,
    [](const PipelineParams& p, Stream) { cpu::proxy_attention(p); },
};

const Backend* g_cuda_backend = nullptr;

}  // namespace

void set_cuda_backend(const Backend* backend) {
  g_cuda_backend = backend;
}

const Backend& backend_of(const char* op, const at::Tensor& tensor) {
  if (tensor.is_cpu()) return kCpuBackend;
  TORCH_CHECK_TYPE(tensor.is_cuda(), op, ": tensors must be on a CPU or a CUDA device, got device ",
                   tensor.device());
  TORCH_CHECK(g_cuda_backend != nullptr, op,
              ": this build of proxyattn has no CUDA kernels; install it again where torch has "
              "CUDA and nvcc is found");
  return *g_cuda_backend;
}

}  // namespace proxyattn::binding
