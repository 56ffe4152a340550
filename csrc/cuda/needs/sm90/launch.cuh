// Host side of the family: tensor maps, items and the launch.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "proxyattn/needs.h"

#include "common/sequence.h"
#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/needs/dispatch.h"
#include "cuda/needs/layout.h"
#include "cuda/needs/sm90/kernel.cuh"
#include "cuda/sequences/packed.h"
#include "cuda/sequences/tensor_sizes.h"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
NeedProblem make_need_problem(const NeedParams& b, int multiprocessors) {
  const char* op = needs_op(b);
  NeedProblem p{};
  p.q_map =
      make_tensor_map(op, b.q, b.dtype, query_sizes(b), b.q_strides, {kGroupRows, Traits::kBoxes});
  p.pages = PageTable(b.packed);
  p.page_loads = PageLoads::of(p.pages.page_shift);
  if (b.packed.page_table != nullptr) {
    p.keys = make_page_maps(op, b.k, b.dtype, key_sizes(b), b.k_strides, p.page_loads);
  } else {
    p.keys =
        make_key_maps(op, b.k, b.dtype, key_sizes(b), b.k_strides, is_packed(b) ? kRunKeys : 1);
  }
  const NeedLayout layout(b);
  p.block_lse = layout.block_lse;
  p.num_kv_blocks = layout.num_kv_blocks;
  p.items = make_need_items(b, Traits::kGroups, multiprocessors);
  p.causal = b.causal ? 1 : 0;
  p.factor = b.scale * kLog2E;
  return p;
}

template <typename Traits, int kBlockKeys>
void launch_block_lse_kernel(const NeedParams& params, Stream stream) {
  const char* op = needs_op(params);
  const int multiprocessors = device_attribute(op, cudaDevAttrMultiProcessorCount);
  const NeedProblem problem = make_need_problem<Traits>(params, multiprocessors);
  LaunchShape shape{};
  shape.grid_x = multiprocessors;
  if (!problem.items.is_packed()) {
    shape.grid_x = min_of<int64_t>(multiprocessors, problem.items.num_entry_items());
  }
  shape.threads = Traits::kThreads;
  shape.shared_bytes = sizeof(NeedStorage<Traits>);
  launch<block_lse_kernel<Traits, kBlockKeys>>(op, shape, stream, problem);
}

template <int kHeadDim, DType kDType>
void launch_block_lse(const NeedParams& params, Stream stream) {
  using Traits = LogitTraits<kHeadDim, kDType>;
  if (params.batch == 0) return;
  if (params.kv_block == kLogitKeys) {
    launch_block_lse_kernel<Traits, kLogitKeys>(params, stream);
  } else {
    launch_block_lse_kernel<Traits, kLogitKeys / 2>(params, stream);
  }
}

}  // namespace proxyattn::cuda::sm90
