#include "nvml.h"

#include <dlfcn.h>

namespace proxyattn::bench {
namespace {

// The few names of nvml.h that are used; the library is loaded at run time and may be absent.
using Handle = void*;
constexpr int kSuccess = 0;
constexpr int kClockSm = 1;

template <typename Function>
bool find(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
  return function != nullptr;
}

}  // namespace

struct Nvml::Library {
  void* file = nullptr;
  Handle gpu = nullptr;
  int (*init)() = nullptr;
  int (*shutdown)() = nullptr;
  int (*handle_by_pci)(const char*, Handle*) = nullptr;
  int (*clock)(Handle, int, unsigned*) = nullptr;
  int (*max_clock)(Handle, int, unsigned*) = nullptr;
  int (*power)(Handle, unsigned*) = nullptr;
  int (*driver)(char*, unsigned) = nullptr;

  bool load() {
    file = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    return file != nullptr && find(file, "nvmlInit_v2", init) &&
           find(file, "nvmlShutdown", shutdown) &&
           find(file, "nvmlDeviceGetHandleByPciBusId_v2", handle_by_pci) &&
           find(file, "nvmlDeviceGetClockInfo", clock) &&
           find(file, "nvmlDeviceGetMaxClockInfo", max_clock) &&
           find(file, "nvmlDeviceGetPowerUsage", power) &&
           find(file, "nvmlSystemGetDriverVersion", driver) && init() == kSuccess;
  }
};

Nvml::Nvml(std::unique_ptr<Library> library) : library_(std::move(library)) {}

Nvml::~Nvml() {
  library_->shutdown();
  dlclose(library_->file);
}

std::unique_ptr<Nvml> Nvml::open(const std::string& pci_bus_id) {
  auto library = std::make_unique<Library>();
  if (!library->load()) return nullptr;
  std::unique_ptr<Nvml> nvml(new Nvml(std::move(library)));
  Library& loaded = *nvml->library_;
  if (loaded.handle_by_pci(pci_bus_id.c_str(), &loaded.gpu) != kSuccess) return nullptr;
  return nvml;
}

std::optional<Sensors> Nvml::read() const {
  unsigned mhz = 0;
  unsigned milliwatts = 0;
  if (library_->clock(library_->gpu, kClockSm, &mhz) != kSuccess) return std::nullopt;
  if (library_->power(library_->gpu, &milliwatts) != kSuccess) return std::nullopt;
  return Sensors{static_cast<double>(mhz), milliwatts / 1000.0};
}

std::string Nvml::driver_version() const {
  char version[96] = "";
  return library_->driver(version, sizeof(version)) == kSuccess ? version : "";
}

int Nvml::max_sm_clock_mhz() const {
  unsigned mhz = 0;
  return library_->max_clock(library_->gpu, kClockSm, &mhz) == kSuccess ? static_cast<int>(mhz) : 0;
}

}  // namespace proxyattn::bench
