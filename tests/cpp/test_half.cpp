// bf16 and fp16 conversions against the formats' definitions in double.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "check.h"
#include "common/half.h"

namespace proxyattn {
namespace {

struct Format {
  int exponent_bits;
  int mantissa_bits;
};
constexpr Format kBFloat16Format{8, 7};
constexpr Format kFloat16Format{5, 10};

// The value of a bit pattern, from the definition: sign, biased exponent, fraction.
double value_of(uint32_t bits, const Format& format) {
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1u);
  const uint32_t top_exponent = (1u << format.exponent_bits) - 1u;
  const uint32_t exponent = (bits >> format.mantissa_bits) & top_exponent;
  const double sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  if (exponent == top_exponent) {
    return mantissa == 0 ? sign * INFINITY : std::numeric_limits<double>::quiet_NaN();
  }
  const int bias = (1 << (format.exponent_bits - 1)) - 1;
  const double fraction = std::ldexp(static_cast<double>(mantissa), -format.mantissa_bits);
  return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias)
                       : sign * std::ldexp(1.0 + fraction, static_cast<int>(exponent) - bias);
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <typename Half>
void check_all_patterns(const Format& format) {
  for (uint32_t bits = 0; bits < 65536u; ++bits) {
    const float value = Half{static_cast<uint16_t>(bits)}.to_float();
    const double expected = value_of(bits, format);
    if (!same(static_cast<double>(value), expected)) CHECK_EQ(value, expected);
    const Half back = Half::from_float(value);
    if (std::isnan(expected)) {
      CHECK(std::isnan(value_of(back.bits, format)));
    } else {
      CHECK_EQ(back.bits, bits);
    }
  }
}

// No neighbour of the result may be nearer to x, nor as near and even. The first value past the
// largest finite one stands for infinity, so that overflow is rounding like any other.
template <typename Half>
void check_rounding(float x, const Format& format) {
  const uint32_t infinity_bits = ((1u << format.exponent_bits) - 1u) << format.mantissa_bits;
  const auto ladder = [&](uint32_t magnitude) {
    if (magnitude < infinity_bits) return value_of(magnitude, format);
    const double largest = value_of(infinity_bits - 1, format);
    return largest + (largest - value_of(infinity_bits - 2, format));
  };
  const uint32_t bits = Half::from_float(x).bits;
  CHECK_EQ((bits & 0x8000u) != 0, std::signbit(x));
  const uint32_t magnitude = bits & 0x7fffu;
  CHECK(magnitude <= infinity_bits);
  const double target = std::fmin(std::fabs(static_cast<double>(x)), ladder(infinity_bits));
  const double error = std::fabs(ladder(magnitude) - target);
  const bool even = magnitude % 2 == 0;
  for (const uint32_t neighbour : {magnitude - 1, magnitude + 1}) {
    if (neighbour > infinity_bits) continue;
    const double neighbour_error = std::fabs(ladder(neighbour) - target);
    if (!(error < neighbour_error || (error == neighbour_error && even))) {
      CHECK_EQ(value_of(bits, format), x);
    }
  }
}

template <typename Half>
void check_rounding_of_many(const Format& format) {
  std::mt19937 random(1);
  for (int i = 0; i < 200000; ++i) {
    const float any = float_from_bits(static_cast<uint32_t>(random()));
    if (!std::isnan(any)) check_rounding<Half>(any, format);
  }
  // Values at, just below and just above the middle of neighbours.
  for (uint32_t bits = 0; bits < 0x7fffu; ++bits) {
    const double low = value_of(bits, format);
    const double high = value_of(bits + 1, format);
    if (!std::isfinite(low) || !std::isfinite(high)) continue;
    const float middle = static_cast<float>((low + high) / 2);
    for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY)}) {
      check_rounding<Half>(x, format);
      check_rounding<Half>(-x, format);
    }
  }
}

TEST(bfloat16_patterns_round_trip) {
  check_all_patterns<BFloat16>(kBFloat16Format);
}
TEST(float16_patterns_round_trip) {
  check_all_patterns<Float16>(kFloat16Format);
}
TEST(bfloat16_rounds_to_nearest_even) {
  check_rounding_of_many<BFloat16>(kBFloat16Format);
}
TEST(float16_rounds_to_nearest_even) {
  check_rounding_of_many<Float16>(kFloat16Format);
}

TEST(literal_values) {
  CHECK_EQ(BFloat16::from_float(1.0f).bits, 0x3f80);
  CHECK_EQ(BFloat16::from_float(-2.0f).bits, 0xc000);
  CHECK_EQ(BFloat16::from_float(1.00390625f).bits, 0x3f80);  // half way, to even
  CHECK_EQ(BFloat16::from_float(1.01171875f).bits, 0x3f82);  // half way, to even
  CHECK_EQ(BFloat16::from_float(3.4e38f).bits, 0x7f80);
  CHECK_EQ(Float16::from_float(1.0f).bits, 0x3c00);
  CHECK_EQ(Float16::from_float(65504.0f).bits, 0x7bff);
  CHECK_EQ(Float16::from_float(65519.996f).bits, 0x7bff);
  CHECK_EQ(Float16::from_float(65520.0f).bits, 0x7c00);
  CHECK_EQ(Float16::from_float(5.9604645e-8f).bits, 0x0001);
  CHECK_EQ(Float16::from_float(2.9802322e-8f).bits, 0x0000);  // half of the smallest, to even
  CHECK_EQ(Float16::from_float(-0.0f).bits, 0x8000);
}

}  // namespace
}  // namespace proxyattn

int main() {
  return proxyattn::test::run_all();
}
