// Spellings of compiler directives that every kernel file uses.
#pragma once

#define PROXYATTN_DEVICE __device__ __forceinline__
#define PROXYATTN_UNROLL _Pragma("unroll")
#define PROXYATTN_NO_UNROLL _Pragma("unroll 1")
