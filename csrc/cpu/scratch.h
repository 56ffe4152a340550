// Scratch memory of the CPU stages, laid out in the workspace that the caller hands in.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/math.h"

namespace proxyattn::cpu {

// Hands out arrays one behind another, each beginning on a cache line. A layout over no memory only
// counts, so that a struct of arrays has its size from the code that places it.
class ScratchLayout {
 public:
  ScratchLayout() = default;
  explicit ScratchLayout(void* memory) : memory_(static_cast<std::byte*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    std::byte* const array = memory_ == nullptr ? nullptr : memory_ + bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), kLineBytes);
    return reinterpret_cast<T*>(array);
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kLineBytes = 64;

  std::byte* memory_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace proxyattn::cpu
