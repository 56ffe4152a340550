// Kernel families: which devices each was built for, and which one a call may use.
#pragma once

#include <limits>
#include <string>

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

}  // namespace proxyattn::cuda
