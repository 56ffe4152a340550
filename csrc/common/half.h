// bf16 and fp16 as bit patterns, for host code.
#pragma once

#include <cstdint>
#include <cstring>

namespace proxyattn {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

struct BFloat16 {
  uint16_t bits;

  static BFloat16 from_float(float value) {
    const uint32_t x = float_bits(value);
    // A NaN keeps its upper bits and stays quiet; everything else rounds to nearest even.
    if ((x & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((x >> 16) | 0x40u)};
    return {static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16)};
  }
  float to_float() const { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
};

struct Float16 {
  uint16_t bits;

  static Float16 from_float(float value) {
    const uint32_t x = float_bits(value);
    const uint32_t sign = (x >> 16) & 0x8000u;
    const uint32_t magnitude = x & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // >= 65520
    if (magnitude < 0x38800000u) {
      // Subnormal: adding 0.5 aligns the value to the fp16 grid and lets the FPU round it.
      const float aligned = float_from_bits(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (float_bits(aligned) - float_bits(0.5f)))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
  }
  float to_float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
    const uint32_t magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u)
      return float_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude < 0x400u) {
      const float value = static_cast<float>(magnitude) * 0x1p-24f;
      return sign != 0 ? -value : value;
    }
    return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  }
};

inline float to_float(float value) {
  return value;
}
inline float to_float(BFloat16 value) {
  return value.to_float();
}
inline float to_float(Float16 value) {
  return value.to_float();
}

template <typename T>
T from_float(float value) {
  return T::from_float(value);
}
template <>
inline float from_float<float>(float value) {
  return value;
}

}  // namespace proxyattn
