// proxyattn._C: facts about this build. Tensors never pass through here, only through torch.ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "proxyattn/device.h"

namespace py = pybind11;

namespace {

// Where _extension.py looks for it when the file can't be loaded.
[[gnu::used]] const char kMadeFor[] = "proxyattn made for torch " PROXYATTN_TORCH_VERSION;

py::dict config_of(const proxyattn::KernelConfig& config) {
  py::dict row;
  row["device"] = config.device;
  row["family"] = config.family;
  row["head_dim"] = config.head_dim;
  row["dtype"] = proxyattn::dtype_name(config.dtype);
  return row;
}

py::list supported_configs() {
  py::list rows;
  for (const auto& config : proxyattn::cpu::supported_configs()) rows.append(config_of(config));
#ifdef PROXYATTN_WITH_CUDA
  for (const auto& config : proxyattn::cuda::supported_configs()) rows.append(config_of(config));
#endif
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Facts about this build of proxyattn.";
  module.attr("version") = PROXYATTN_VERSION;
  module.attr("torch_version") = PROXYATTN_TORCH_VERSION;
#ifdef PROXYATTN_WITH_CUDA
  module.attr("cuda_version") = proxyattn::cuda::runtime_version();
  module.attr("cuda_architectures") = proxyattn::cuda::built_architectures();
#else
  module.attr("cuda_version") = py::none();
  module.attr("cuda_architectures") = "";
#endif
  module.def("supported_configs", supported_configs,
             "The kernels of this build: a list of {device, family, head_dim, dtype}.");
}
