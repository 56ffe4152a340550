// Barriers in shared memory (mbarrier), named barriers of a thread block, and the two debug builds
// that test the protocols built from them:
//   PROXYATTN_WATCHDOG  a wait that lasts seconds reports site, phase, block and thread, and traps
//   PROXYATTN_JITTER    random sleeps before every wait and arrive
#pragma once

#include <cstdint>
#include <cstdio>

#include "cuda/ptx/address.cuh"

namespace proxyattn::cuda::ptx {

__device__ __forceinline__ void jitter() {
#ifdef PROXYATTN_JITTER
  uint32_t x = static_cast<uint32_t>(clock64()) * 2654435761u ^ (blockIdx.x * 97u + threadIdx.x);
  x ^= x >> 15;
  if ((x & 3u) == 0) __nanosleep((x >> 8) & 2047u);
#endif
}

// Where a wait stands in the protocol, for the watchdog's report.
enum class WaitSite : int {
  kProducerQuery,
  kProducerKey,
  kProducerValue,
  kProducerOrder,
  kScoutQuery,
  kScoutOrder,
  kConsumerQuery,
  kConsumerKey,
  kConsumerValue,
};

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes the inits visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  jitter();
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// Arrives and announces `bytes` that the copy engine will deliver before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  jitter();
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(phase)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t phase, WaitSite site) {
  jitter();
#ifdef PROXYATTN_WATCHDOG
  constexpr long long kPatienceCycles = 4000000000ll;  // two to three seconds
  const long long start = clock64();
  while (!mbarrier_try_wait(barrier, phase)) {
    if (clock64() - start > kPatienceCycles) {
      printf("proxyattn: wait %d timed out at phase %u in block %u, thread %u\n",
             static_cast<int>(site), phase, blockIdx.x, threadIdx.x);
      __trap();
    }
  }
#else
  (void)site;
  asm volatile(
      "{\n.reg .pred p;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}\n" ::"r"(shared_address(barrier)),
      "r"(phase)
      : "memory");
#endif
}

// Named barriers: `threads` counts those that sync and those that only arrive.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  jitter();
  asm volatile("barrier.cta.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  jitter();
  asm volatile("barrier.cta.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace proxyattn::cuda::ptx
