// The tensor copy engine (TMA): five-dimensional tiles between global and shared memory, the fence
// that hands it data written by ordinary stores, and register reallocation between warpgroups.
#pragma once

#include <cstdint>

#include <cuda.h>

#include "cuda/ptx/mbarrier.cuh"

namespace proxyattn::cuda::ptx {

// L2 eviction policies, as createpolicy encodes them.
inline constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;
inline constexpr uint64_t kEvictNormal = 0x1000000000000000ull;

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// Loads one box at coordinates (c0 innermost .. c4); its bytes complete on `barrier`. What lies
// outside the tensor is filled with zeros.
__device__ __forceinline__ void tma_load(void* shared,
                                         const CUtensorMap* map,
                                         uint64_t* barrier,
                                         int c0,
                                         int c1,
                                         int c2,
                                         int c3,
                                         int c4,
                                         uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(shared)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2),
      "r"(c3), "r"(c4), "l"(policy)
      : "memory");
}

// Stores one box; what lies outside the tensor is dropped. Completes in this thread's bulk group.
__device__ __forceinline__ void tma_store(
    const CUtensorMap* map, const void* shared, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group"
      " [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(reinterpret_cast<uint64_t>(map)),
      "r"(shared_address(shared)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until the copy engine has read the shared memory of all committed stores.
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
// Until all committed stores have been written.
__device__ __forceinline__ void tma_store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Orders this thread's ordinary stores to shared memory before later reads by the copy engine or
// by wgmma. Every writing thread executes it before the barrier that announces the data.
__device__ __forceinline__ void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int Registers>
__device__ __forceinline__ void give_back_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace proxyattn::cuda::ptx
