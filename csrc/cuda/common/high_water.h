// The largest size that was asked for on each device, for settings that only ever grow.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

namespace proxyattn::cuda {

class HighWater {
 public:
  // Calls raise() if `size` is more than any before on the device. Calls come one at a time, so
  // that a smaller size never replaces a larger one; a raise() that throws counts as not made.
  template <typename Raise>
  void reach(int device, int size, const Raise& raise) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto idx = static_cast<std::size_t>(device);
    if (idx >= sizes_.size()) sizes_.resize(idx + 1, 0);
    if (size <= sizes_[idx]) return;
    raise();
    sizes_[idx] = size;
  }

 private:
  std::mutex mutex_;
  std::vector<int> sizes_;
};

}  // namespace proxyattn::cuda
