// Stage 2, score_blocks, for compute capability 9.0: TMA, wgmma, specialised warps, one pass.
//
// For every sampled row r and key block n the kernel leaves in scratch the largest logit and, if
// mass is wanted, the log of the sum of exponentials, and for every row and chunk of keys the
// log-sum-exp; finish_kernel.cuh makes cells of them. No logit is computed twice.
//
// Grid: one persistent thread block per multiprocessor, taking items (scheduler.cuh) through a
// counter. Warp 0 loads keys (producer.cuh), warp 1 takes items and loads queries (scout.cuh), the
// warpgroups behind theirs compute 64 rows each (consumer.cuh). Shared memory: rings of query and
// key tiles, up to 225 KB. Assumes tensors that the copy engine can address.
#pragma once

#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/score/sm90/consumer.cuh"
#include "cuda/score/sm90/problem.h"
#include "cuda/score/sm90/producer.cuh"
#include "cuda/score/sm90/scout.cuh"
#include "cuda/score/sm90/shared_storage.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits, int kBlockKeys, bool kWithMass>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    score_kernel(const __grid_constant__ ScoreProblem problem) {
  static_assert(sizeof(ScoreStorage<Traits>) <= kLogitSharedBytes);
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<ScoreStorage<Traits>*>(raw_shared);
  // Through a shuffle, so that the compiler knows the role to be uniform in a warp.
  const int warpgroup = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&problem.q_map);
    ptx::prefetch_tensor_map(&problem.keys.whole);
    shared.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the barriers are initialised

  if (warpgroup == 0) {
    ptx::give_back_registers<Traits::kProducerRegisters>();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpLanes, 0);
    if (threadIdx.x == 0) load_score_keys<Traits>(problem, shared);
    if (warp == 1) ScoreScout<Traits>(problem, shared).run();
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    ScoreConsumer<Traits, kBlockKeys, kWithMass>(problem, shared, warpgroup - 1).run();
  }
}

}  // namespace proxyattn::cuda::sm90
