// Stage 3, what each head needs, first kernel, for compute capability 9.0: TMA, wgmma, specialised
// warps.
//
//   block_lse[h, n, r] = log2 of the sum over the visible keys u of block n of 2^(factor * q . k_u)
//
// for query r of the last q_block ones of head h; factor = scale * log2(e). -inf where nothing is
// visible; what rows past the last query get is never read.
//
// Grid: one persistent thread block per multiprocessor; items (items.h) are dealt out in turn.
// Warp 0 loads (producer.cuh), the warpgroups behind its own compute 64 rows each (consumer.cuh).
// Shared memory: rings of query and key tiles, up to 225 KB. Assumes tensors that the copy engine
// can address.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/needs/sm90/consumer.cuh"
#include "cuda/needs/sm90/problem.h"
#include "cuda/needs/sm90/producer.cuh"
#include "cuda/needs/sm90/shared_storage.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits, int kBlockKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    block_lse_kernel(const __grid_constant__ NeedProblem problem) {
  static_assert(sizeof(NeedStorage<Traits>) <= kLogitSharedBytes);
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<NeedStorage<Traits>*>(raw_shared);
  // Through a shuffle, so that the compiler knows the role to be uniform in a warp.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&problem.q_map);
    ptx::prefetch_tensor_map(&problem.keys.whole);
    shared.logits.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the barriers are initialised

  if (warpgroup == 0) {
    ptx::give_back_registers<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
    if (warp == 0) NeedProducer<Traits>(problem, shared).run();
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    NeedConsumer<Traits, kBlockKeys>(problem, shared, warpgroup - 1).run();
  }
}

}  // namespace proxyattn::cuda::sm90
