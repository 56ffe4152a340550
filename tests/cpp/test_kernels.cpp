// The inner loops of every instruction family that this processor can run, against doubles.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "common/half.h"
#include "cpu/simd/kernels.h"
#include "random.h"

namespace proxyattn::cpu {
namespace {

using test::normal_floats;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kRoundingUnit = 0x1p-24;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

void for_each_family(const std::function<void(const Kernels&)>& check) {
  for (const Kernels* family : supported_kernels()) check(*family);
}

// exp(x) as the kernels compute it, by a softmax step of one key relative to 0: the maximum stays
// at 0 for x <= 0, and the probability is exp(x - 0).
std::vector<float> exp_of(const Kernels& family, const std::vector<float>& xs) {
  std::vector<float> results;
  for (std::size_t i = 0; i < xs.size(); i += static_cast<std::size_t>(family.panel)) {
    float scores[kMaxPanel] = {};
    float top[kMaxPanel] = {};
    double sum[kMaxPanel] = {};
    float decay[kMaxPanel];
    const std::size_t count = std::min(static_cast<std::size_t>(family.panel), xs.size() - i);
    std::copy_n(xs.begin() + static_cast<std::ptrdiff_t>(i), count, scores);
    family.softmax_step(1, scores, top, sum, decay);
    results.insert(results.end(), scores, scores + count);
  }
  return results;
}

TEST(exp_is_accurate) {
  std::vector<float> xs;
  for (float x = 0.0f; x > -87.3f; x -= 1.7e-4f) xs.push_back(x);
  for (float x = -1.0f; x < -1e-30f; x *= 0.9f) xs.push_back(x);
  for_each_family([&](const Kernels& family) {
    const std::vector<float> results = exp_of(family, xs);
    double worst = 0.0;
    for (std::size_t i = 0; i < xs.size(); ++i) {
      const double exact = std::exp(static_cast<double>(xs[i]));
      const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      worst = std::max(worst, std::fabs(static_cast<double>(results[i]) - exact) / ulp);
    }
    CHECK(worst < 1.5);
  });
}

TEST(exp_of_special_values) {
  for_each_family([](const Kernels& family) {
    const std::vector<float> results =
        exp_of(family, {0.0f, -0.0f, -kInf, kNan, -1e30f, -88.0f, -87.0f, -1e-40f});
    CHECK_EQ(results[0], 1.0f);
    CHECK_EQ(results[1], 1.0f);
    CHECK_EQ(results[2], 0.0f);
    CHECK(std::isnan(results[3]));
    CHECK_EQ(results[4], 0.0f);
    CHECK_EQ(results[5], 0.0f);  // below the smallest normal number
    CHECK_NEAR(results[6], std::exp(-87.0), 1e-44);
    CHECK_EQ(results[7], 1.0f);
  });
}

template <typename Half>
void check_conversions(const Kernels& family, DType dtype) {
  std::vector<uint16_t> patterns(65536);
  for (std::size_t i = 0; i < patterns.size(); ++i) patterns[i] = static_cast<uint16_t>(i);
  std::vector<float> values(patterns.size());
  family.widen(dtype, patterns.data(), 65536, values.data());
  std::vector<uint16_t> back(patterns.size());
  family.narrow(dtype, values.data(), 65536, back.data());
  for (std::size_t i = 0; i < patterns.size(); ++i) {
    const float expected = Half{patterns[i]}.to_float();
    if (std::isnan(expected)) {
      CHECK(std::isnan(values[i]) && std::isnan(Half{back[i]}.to_float()));
    } else {
      CHECK_EQ(float_bits(values[i]), float_bits(expected));
      CHECK_EQ(back[i], patterns[i]);
    }
  }
  // Values between the patterns, in a length that is no multiple of a vector's.
  std::vector<float> between = normal_floats(10007, 3);
  for (std::size_t i = 0; i < between.size(); ++i) {
    between[i] = std::ldexp(between[i], static_cast<int>(i % 50) - 30);
  }
  std::vector<uint16_t> narrowed(between.size());
  family.narrow(dtype, between.data(), static_cast<int64_t>(between.size()), narrowed.data());
  for (std::size_t i = 0; i < between.size(); ++i) {
    CHECK_EQ(narrowed[i], Half::from_float(between[i]).bits);
  }
}

TEST(conversions_agree_with_the_formats) {
  for_each_family([](const Kernels& family) {
    check_conversions<BFloat16>(family, DType::kBFloat16);
    check_conversions<Float16>(family, DType::kFloat16);
  });
}

TEST(scores_are_products) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    for (const int64_t head_dim : {8, 24, 64, 96, 128, 200, 256}) {
      const auto dim = static_cast<std::size_t>(head_dim);
      const std::vector<float> queries = normal_floats(dim * panel, 1);
      const std::vector<float> keys = normal_floats(dim * kMaxTileKeys, 2);
      for (const std::size_t num_keys : {1, 2, 5, 6, 7, 8, 63, 64, 127, 128}) {
        std::vector<float> scores(num_keys * panel + 1, 77.0f);
        family.scores(queries.data(), keys.data(), static_cast<int64_t>(num_keys), head_dim,
                      scores.data());
        CHECK_EQ(scores.back(), 77.0f);
        for (std::size_t key = 0; key < num_keys; ++key) {
          for (std::size_t row = 0; row < panel; ++row) {
            double dot = 0.0, magnitude = 0.0;
            for (std::size_t d = 0; d < dim; ++d) {
              const double product = static_cast<double>(queries[d * panel + row]) *
                                     static_cast<double>(keys[key * dim + d]);
              dot += product;
              magnitude += std::fabs(product);
            }
            // Sums of 64 products, and a sum of at most four of those.
            CHECK_NEAR(scores[key * panel + row], dot, (64 + 4) * kRoundingUnit * magnitude);
          }
        }
      }
    }
  });
}

TEST(a_score_does_not_depend_on_its_neighbours) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    const std::vector<float> queries = normal_floats(128 * panel, 1);
    const std::vector<float> keys = normal_floats(128 * kMaxTileKeys, 2);
    std::vector<float> all(kMaxTileKeys * panel);
    family.scores(queries.data(), keys.data(), kMaxTileKeys, 128, all.data());
    for (std::size_t key = 0; key < kMaxTileKeys; ++key) {
      std::vector<float> one(panel);
      family.scores(queries.data(), keys.data() + key * 128, 1, 128, one.data());
      CHECK(std::memcmp(one.data(), all.data() + key * panel, panel * sizeof(float)) == 0);
    }
  });
}

TEST(accumulate_adds_weighted_values_to_decayed_sums) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    for (const int64_t head_dim : {8, 24, 64, 96, 128, 200, 256}) {
      const auto dim = static_cast<std::size_t>(head_dim);
      const std::vector<float> values = normal_floats(dim * kMaxTileKeys, 1);
      const std::vector<float> weights = normal_floats(panel * kMaxTileKeys, 2);
      const std::vector<float> decay = normal_floats(panel, 3);
      const std::vector<float> before = normal_floats(dim * panel, 4);
      std::vector<float> packed(dim * kMaxTileKeys);
      // Fewer keys may be summed than were packed.
      family.pack_values(values.data(), 100, head_dim, packed.data());
      for (const std::size_t num_keys : {1, 63, 100}) {
        std::vector<float> out = before;
        family.accumulate(packed.data(), weights.data(), decay.data(),
                          static_cast<int64_t>(num_keys), head_dim, out.data());
        for (std::size_t d = 0; d < dim; ++d) {
          for (std::size_t row = 0; row < panel; ++row) {
            double expected =
                static_cast<double>(decay[row]) * static_cast<double>(before[d * panel + row]);
            double magnitude = std::fabs(expected);
            for (std::size_t key = 0; key < num_keys; ++key) {
              const double product = static_cast<double>(weights[key * panel + row]) *
                                     static_cast<double>(values[key * dim + d]);
              expected += product;
              magnitude += std::fabs(product);
            }
            CHECK_NEAR(out[d * panel + row], expected,
                       static_cast<double>(num_keys + 2) * kRoundingUnit * magnitude);
          }
        }
      }
    }
  });
}

TEST(mask_hides_keys_before_the_begin_and_from_the_end) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    std::vector<float> scores(7 * panel, 1.0f);
    scores[0] = scores[6 * panel] = kNan;  // a masked NaN goes
    std::vector<int32_t> begin(panel), end(panel);
    for (std::size_t row = 0; row < panel; ++row) {
      begin[row] = static_cast<int32_t>((row + 2) % 5);
      end[row] = static_cast<int32_t>((row + 4) % 9);
    }
    family.mask(begin.data(), end.data(), 7, scores.data());
    for (std::size_t key = 0; key < 7; ++key) {
      for (std::size_t row = 0; row < panel; ++row) {
        const bool seen =
            begin[row] <= static_cast<int32_t>(key) && static_cast<int32_t>(key) < end[row];
        CHECK_EQ(scores[key * panel + row], seen ? 1.0f : -kInf);
      }
    }
  });
}

TEST(softmax_steps_add_up_to_one_softmax) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    const std::vector<float> scores = normal_floats(128 * panel, 5, 10.0f);
    std::vector<float> probabilities = scores;
    std::vector<float> top(panel, -kInf), decay(panel);
    std::vector<double> sum(panel, 0.0);
    family.softmax_step(50, probabilities.data(), top.data(), sum.data(), decay.data());
    for (std::size_t row = 0; row < panel; ++row) CHECK_EQ(decay[row], 0.0f);
    family.softmax_step(78, probabilities.data() + 50 * panel, top.data(), sum.data(),
                        decay.data());
    for (std::size_t row = 0; row < panel; ++row) {
      double largest = -INFINITY, first_largest = -INFINITY, total = 0.0;
      for (std::size_t key = 0; key < 128; ++key) {
        const double score = static_cast<double>(scores[key * panel + row]);
        largest = std::max(largest, score);
        if (key < 50) first_largest = std::max(first_largest, score);
      }
      for (std::size_t key = 0; key < 128; ++key) {
        total += std::exp(static_cast<double>(scores[key * panel + row]) - largest);
      }
      CHECK_EQ(static_cast<double>(top[row]), largest);
      CHECK_NEAR(sum[row], total, 1e-6 * total);
      CHECK_NEAR(decay[row], std::exp(first_largest - largest), 1e-6);
    }
  });
}

TEST(softmax_step_of_special_rows) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    std::vector<float> scores(2 * panel, 1.0f);
    const auto set = [&](std::size_t row, float first, float second) {
      scores[row] = first;
      scores[panel + row] = second;
    };
    set(0, -kInf, -kInf);  // sees nothing
    set(1, kNan, 1.0f);
    set(2, kInf, 1.0f);
    std::vector<float> top(panel, -kInf), decay(panel);
    std::vector<double> sum(panel, 0.0);
    family.softmax_step(2, scores.data(), top.data(), sum.data(), decay.data());
    CHECK_EQ(top[0], -kInf);
    CHECK_EQ(sum[0], 0.0);
    CHECK_EQ(scores[0], 0.0f);
    CHECK(std::isnan(sum[1]));
    CHECK(std::isnan(sum[2]));
    CHECK_EQ(top[3], 1.0f);
    CHECK_EQ(sum[3], 2.0);
  });
}

TEST(block_statistics_become_probabilities) {
  for_each_family([](const Kernels& family) {
    const auto panel = static_cast<std::size_t>(family.panel);
    constexpr std::size_t kKeys = 77, kPerBlock = 16, kBlocks = 5, kStride = 128;
    std::vector<float> scores = normal_floats(kKeys * panel, 6, 20.0f);
    for (std::size_t key = 32; key < kKeys; ++key) scores[key * panel + 1] = -kInf;  // row 1
    std::vector<float> top(kBlocks * kStride), sum(kBlocks * kStride);
    family.block_stats(scores.data(), kKeys, kPerBlock, kStride, top.data(), sum.data());
    CHECK_EQ(top[2 * kStride + 1], -kInf);
    CHECK_EQ(sum[2 * kStride + 1], 0.0f);
    family.normalize(kBlocks, kStride, top.data(), sum.data());
    for (std::size_t row = 0; row < panel; ++row) {
      double total = 0.0;
      for (std::size_t key = 0; key < kKeys; ++key) {
        total += std::exp(static_cast<double>(scores[key * panel + row]));
      }
      for (std::size_t n = 0; n < kBlocks; ++n) {
        double largest = -INFINITY, mass = 0.0;
        for (std::size_t key = n * kPerBlock; key < std::min(kKeys, (n + 1) * kPerBlock); ++key) {
          const double score = static_cast<double>(scores[key * panel + row]);
          largest = std::max(largest, score - std::log(total));
          mass += std::exp(score) / total;
        }
        CHECK_NEAR(top[n * kStride + row], largest, 1e-5);
        CHECK_NEAR(sum[n * kStride + row], mass, 1e-6);
      }
    }
  });
}

TEST(families_are_named_and_the_first_is_used) {
  CHECK_EQ(std::string(supported_kernels().back()->family), "baseline");
  CHECK_EQ(&kernels(), supported_kernels().front());
  for_each_family([](const Kernels& family) { CHECK_EQ(kMaxPanel % family.panel, 0); });
}

}  // namespace
}  // namespace proxyattn::cpu

int main() {
  return proxyattn::test::run_all();
}
