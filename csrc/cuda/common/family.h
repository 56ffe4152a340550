// Kernel families: which devices each was built for, and which one a call may use.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "proxyattn/device.h"
#include "proxyattn/error.h"
#include "proxyattn/types.h"

namespace proxyattn::cuda {

struct Family {
  const char* name;
  // Compute capabilities, 10 * major + minor.
  int min_capability;
  int max_capability;

  constexpr bool runs_on(int capability) const {
    return min_capability <= capability && capability <= max_capability;
  }
};

inline constexpr Family kSm80{"sm80", 80, std::numeric_limits<int>::max()};
// Built from instructions of compute capability 9.0 that no other has.
inline constexpr Family kSm90{"sm90", 90, 90};

// The families that a call of `op` on the current device may use.
class FamilyChoice {
 public:
  explicit FamilyChoice(const char* op);

  int capability() const { return capability_; }
  // The name in PROXYATTN_FAMILY, which forces a family so that one can check another on the same
  // device; null when the variable is unset or empty.
  const char* forced() const { return forced_; }
  bool allows(const Family& family) const;
  // Throws that the forced family does not take the device and the call. No call can be refused
  // without one, where a family takes every layout.
  [[noreturn]] void refuse(const char* op, const std::string& call) const;

 private:
  int capability_;
  const char* forced_;
};

inline constexpr int64_t kAnyHeadDim = 0;

// What a row of an op's table of kernels was built for.
struct KernelKey {
  Family family;
  int64_t head_dim;  // kAnyHeadDim: any of them, and either type
  DType dtype;
  bool takes_windows = true;

  template <typename Params>
  bool is_built_for(const Params& p) const {
    if (p.window > 0 && !takes_windows) return false;
    return head_dim == kAnyHeadDim || (head_dim == p.head_dim && dtype == p.dtype);
  }
};

inline constexpr bool kNoWindows = false;

// What of a call a row is chosen by, but for its layout.
template <typename Params>
std::string describe_call(const Params& p) {
  const std::string text = join_message("head_dim=", p.head_dim, ", dtype=", dtype_name(p.dtype));
  return p.window == 0 ? text : join_message(text, ", window=", p.window);
}

// The first row of a table, newest family first, that may run and takes the call's layout; null if
// there is none. A row's `fits` is null where it takes every layout.
template <typename Kernel, int kSize, typename Params>
const Kernel* find_kernel(const Kernel (&table)[kSize],
                          const FamilyChoice& choice,
                          const Params& params) {
  for (const Kernel& kernel : table) {
    if (!choice.allows(kernel.family) || !kernel.is_built_for(params)) continue;
    if (kernel.fits == nullptr || kernel.fits(params)) return &kernel;
  }
  return nullptr;
}

}  // namespace proxyattn::cuda
