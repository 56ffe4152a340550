// Block-sparse attention forward for compute capability 9.0: TMA, wgmma, specialised warps.
//
//   o = softmax(scale * q k^T over the chosen blocks) v,   lse = its log-sum-exp
//
// Shapes: see problem.h. Grid: a persistent thread block per multiprocessor; its teams work on
// query tiles of their own. The first warpgroups compute, two of a team, 64 query rows each
// (consumer.cuh); in the last one a warp or two of each team load keys and values (producer.cuh),
// another queries, and finds out which (scout.cuh). Shared memory: a team's query, key and value
// rings (shared_storage.cuh), up to 226 KB in all. Which block sizes and tensors it takes
// layout.cpp says. README.md has the vocabulary and a drawing of the schedule.
#pragma once

#include "cuda/attention/sm90/consumer.cuh"
#include "cuda/attention/sm90/problem.h"
#include "cuda/attention/sm90/producer.cuh"
#include "cuda/attention/sm90/scout.cuh"
#include "cuda/attention/sm90/shared_storage.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_kernel(const __grid_constant__ Problem problem) {
  using Storage = SharedStorage<Traits>;
  static_assert(Traits::kTeams * sizeof(Storage) <= kMaxSharedBytes);
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto* storage = reinterpret_cast<Storage*>(raw_shared);
  // Through a shuffle, so that the compiler knows the role to be uniform in a warp.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const int warpgroup = warp / 4;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&problem.q_map);
    ptx::prefetch_tensor_map(&problem.k_map);
    ptx::prefetch_tensor_map(&problem.v_map);
    ptx::prefetch_tensor_map(&problem.out_map);
    for (int team = 0; team < Traits::kTeams; ++team) {
      storage[team].query_barriers.init(kConsumerWarps);
      storage[team].key_barriers.init(kConsumerWarps);
      storage[team].value_barriers.init(kConsumerWarps);
      storage[team].order_barriers.init(Traits::kProducers * kWarpLanes, kWarpLanes);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the barriers are initialised

  if (warpgroup == Traits::kConsumerGroups) {
    ptx::give_back_registers<Traits::kProducerRegisters>();
    const int team = warp % Traits::kTeams;
    const int role = warp % 4 / Traits::kTeams;
    if (role == 0) Scout<Traits>(problem, storage[team], team).run();
    if constexpr (Traits::kProducers == 1) {
      if (role == 1) Producer<Traits, Loads::kBoth>(problem, storage[team]).run();
    } else {
      if (role == 1) Producer<Traits, Loads::kKeys>(problem, storage[team]).run();
      if (role == 2) Producer<Traits, Loads::kValues>(problem, storage[team]).run();
    }
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(problem, storage[warpgroup / 2], warpgroup).run();
  }
}

}  // namespace proxyattn::cuda::sm90
