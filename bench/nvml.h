// Clock and power of a GPU while it works, from the driver's management library if there is one.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "machine.h"

namespace proxyattn::bench {

class Nvml {
 public:
  // The GPU at this PCI address; null where the library or the GPU can't be reached.
  static std::unique_ptr<Nvml> open(const std::string& pci_bus_id);
  ~Nvml();
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  std::optional<Sensors> read() const;
  std::string driver_version() const;
  int max_sm_clock_mhz() const;  // 0: not known

 private:
  struct Library;
  explicit Nvml(std::unique_ptr<Library> library);
  std::unique_ptr<Library> library_;
};

}  // namespace proxyattn::bench
