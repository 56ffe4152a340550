// Random numbers of the C++ tests.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

namespace proxyattn::test {

inline std::vector<float> normal_floats(std::size_t count, unsigned seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

}  // namespace proxyattn::test
