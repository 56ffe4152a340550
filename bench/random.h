// Normal random values by position, the same on host and device up to the last bit of a float.
#pragma once

#include <cmath>
#include <cstdint>

#include "proxyattn/types.h"

#include "common/math.h"

namespace proxyattn::bench {

// The output function of the splitmix64 generator: a well mixed word for every counter.
PROXYATTN_HOST_DEVICE uint64_t mix(uint64_t counter) {
  counter += 0x9e3779b97f4a7c15u;
  counter = (counter ^ (counter >> 30)) * 0xbf58476d1ce4e5b9u;
  counter = (counter ^ (counter >> 27)) * 0x94d049bb133111ebu;
  return counter ^ (counter >> 31);
}

// Box-Muller on two 24-bit uniform numbers; the first is never 0.
PROXYATTN_HOST_DEVICE float normal_at(uint64_t seed, int64_t index) {
  const uint64_t word = mix(mix(seed) + static_cast<uint64_t>(index));
  const float radius_uniform = static_cast<float>((word >> 40) + 1) * 0x1p-24f;
  const float angle_uniform = static_cast<float>(word & 0xffffffu) * 0x1p-24f;
  return sqrtf(-2.0f * logf(radius_uniform)) * cosf(6.28318531f * angle_uniform);
}

// random.cu, in CUDA builds only.
void fill_normal_on_device(void* to, int64_t count, DType dtype, uint64_t seed, Stream stream);
const char* cuda_compiler();

}  // namespace proxyattn::bench
