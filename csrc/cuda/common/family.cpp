#include "cuda/common/family.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include <cuda_runtime_api.h>

#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "cuda/common/check.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kFamilyVariable = "PROXYATTN_FAMILY";

constexpr Family kFamilies[] = {
#ifdef PROXYATTN_HAS_SM90
    kSm90,
#endif
    kSm80,
};

int current_capability(const char* op) {
  int device = 0;
  PROXYATTN_CUDA_CALL(op, cudaGetDevice(&device));
  return device_capability(device);
}

const char* forced_family(const char* op) {
  const char* name = std::getenv(kFamilyVariable);
  if (name == nullptr || *name == '\0') return nullptr;
  std::string names;
  for (const Family& family : kFamilies) {
    if (std::strcmp(family.name, name) == 0) return name;
    names += (names.empty() ? "" : ", ") + std::string(family.name);
  }
  throw InvalidArgument(
      join_message(op, ": ", kFamilyVariable, " must be one of ", names, ", got ", name));
}

}  // namespace

FamilyChoice::FamilyChoice(const char* op)
    : capability_(current_capability(op)), forced_(forced_family(op)) {}

bool FamilyChoice::allows(const Family& family) const {
  if (forced_ != nullptr && std::strcmp(family.name, forced_) != 0) return false;
  return family.runs_on(capability_);
}

void FamilyChoice::refuse(const char* op, const std::string& call) const {
  throw InvalidArgument(
      join_message(op, ": ", kFamilyVariable, " must name a family that takes this device and ",
                   "layout, got ", forced_ == nullptr ? "none" : forced_, " with ", call,
                   ", compute capability ", capability_ / 10, ".", capability_ % 10));
}

}  // namespace proxyattn::cuda
