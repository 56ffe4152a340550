// Shared memory of a thread block of the sm90 kernel of estimate_needs.
#pragma once

#include "cuda/needs/sm90/items.h"
#include "cuda/sm90/logit_tiles.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
struct __align__(1024) NeedStorage {
  LogitStorage<Traits> logits;
  NeedItem items[Traits::kQueryStages];  // what the query slots hold
};

}  // namespace proxyattn::cuda::sm90
