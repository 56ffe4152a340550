// Rings of shared-memory slots between one producer and a few consumer warpgroups.
//
// Every slot has two barriers. `full`: the producer announces the bytes, the copy engine completes
// the phase. `empty`: each reading warp arrives once when it has read the slot. Of what threads
// write and read themselves, all of them arrive.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/mbarrier.cuh"

namespace proxyattn::cuda {

template <int Stages>
struct RingBarriers {
  uint64_t full[Stages];
  uint64_t empty[Stages];

  __device__ void init(int readers, int writers = 1) {
    for (int i = 0; i < Stages; ++i) {
      ptx::mbarrier_init(&full[i], writers);
      ptx::mbarrier_init(&empty[i], readers);
    }
  }
};

// A warp has read a slot: all its lanes, before one of them says so.
PROXYATTN_DEVICE void release_slot(uint64_t* empty) {
  __syncwarp();
  if (leads_warp()) ptx::mbarrier_arrive(empty);
}

// What the producer wrote beside a slot. One lane reads it for its warp, the one that gives the
// slot back: its read, its arrival and the producer's next write follow one another.
PROXYATTN_DEVICE int read_beside(const int& word) {
  int value = 0;
  if (leads_warp()) value = *const_cast<const volatile int*>(&word);
  return __shfl_sync(kAllLanes, value, 0);
}

// Position in a ring. Phases flip when the slot wraps; a producer starts one phase ahead so that
// its first pass over the empty barriers doesn't wait.
template <int Stages>
struct Ring {
  int slot = 0;
  uint32_t phase = 0;

  PROXYATTN_DEVICE void next() {
    if (++slot == Stages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace proxyattn::cuda
