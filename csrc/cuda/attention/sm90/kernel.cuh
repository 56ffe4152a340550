// Block-sparse attention forward for compute capability 9.0: TMA, wgmma, specialised warps.
//
//   o = softmax(scale * q k^T over the chosen blocks) v,   lse = its log-sum-exp
//
// Shapes: see problem.h. Grid: persistent thread blocks, one or two per multiprocessor; warpgroup 0
// gives its registers away and one of its warps loads (producer.cuh), warpgroups 1 and 2 compute 64
// query rows each (consumer.cuh). Shared memory: query, key and value rings (shared_storage.cuh),
// up to 226 KB. Assumes query blocks of 128 rows, key blocks that are multiples of the key tile,
// and tensors that the copy engine can address (launch.cuh checks both).
#pragma once

#include "cuda/attention/sm90/consumer.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/producer.cuh"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(kThreads, Traits::kBlocksPerSm)
    attention_kernel(const __grid_constant__ Problem problem) {
  static_assert(Traits::kBlocksPerSm * sizeof(SharedStorage<Traits>) <= kMaxSharedBytes);
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(raw_shared);
  // Through a shuffle, so that the compiler knows the role to be uniform in a warp.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&problem.q_map);
    ptx::prefetch_tensor_map(&problem.k_map);
    ptx::prefetch_tensor_map(&problem.v_map);
    ptx::prefetch_tensor_map(&problem.out_map);
    shared.query_barriers.init();
    shared.key_barriers.init();
    shared.value_barriers.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the barriers are initialised

  if (warpgroup == 0) {
    ptx::give_back_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) Producer<Traits>(problem, shared).run();
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    if (warpgroup == 1) {
      Consumer<Traits, 0>(problem, shared).run();
    } else {
      Consumer<Traits, 1>(problem, shared).run();
    }
  }
}

}  // namespace proxyattn::cuda::sm90
