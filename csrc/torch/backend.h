// The core's functions of one device behind one table, so that every op has a single binding.
#pragma once

#include <ATen/core/Tensor.h>

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

namespace proxyattn::binding {

struct Backend {
  // Called first in every op, with the device guard set: the stream to launch on.
  Stream (*begin)(const at::Tensor& tensor);

  void (*pool_heads)(const PoolParams&, Stream);
  int64_t (*score_blocks_workspace_bytes)(const ScoreParams&);
  void (*score_blocks)(const ScoreParams&, Stream);
  int64_t (*estimate_needs_workspace_bytes)(const NeedParams&);
  void (*estimate_needs)(const NeedParams&, Stream);
  void (*select_blocks)(const SelectParams&, Stream);
  int64_t (*block_sparse_attention_workspace_bytes)(const AttentionParams&);
  void (*block_sparse_attention)(const AttentionParams&, Stream);
  int64_t (*choose_blocks_workspace_bytes)(const PipelineParams&);
  void (*choose_blocks)(const PipelineParams&, Stream);
  int64_t (*proxy_attention_workspace_bytes)(const PipelineParams&);
  void (*proxy_attention)(const PipelineParams&, Stream);
};

// The table for the tensor's device; raises if this build has no kernels for it.
const Backend& backend_of(const char* op, const at::Tensor& tensor);

// Called once by cuda.cpp, which is built only against a torch that has CUDA.
void set_cuda_backend(const Backend* backend);

}  // namespace proxyattn::binding
