// Turns a failed CUDA call into a CudaError sentence: op, call, error name and text. The runtime's
// last error is taken back, or whoever asks for it next would be blamed for this call.
#pragma once

#include <cuda_runtime_api.h>

#include "proxyattn/error.h"

#define PROXYATTN_CUDA_CALL(op, call)                                            \
  do {                                                                           \
    const cudaError_t proxyattn_error = (call);                                  \
    if (proxyattn_error != cudaSuccess) {                                        \
      static_cast<void>(cudaGetLastError());                                     \
      throw ::proxyattn::CudaError(::proxyattn::join_message(                    \
          op, ": ", #call, " failed: ", cudaGetErrorName(proxyattn_error), " (", \
          cudaGetErrorString(proxyattn_error), ")"));                            \
    }                                                                            \
  } while (false)
