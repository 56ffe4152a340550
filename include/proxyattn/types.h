// Plain types and limits shared by every stage's params struct.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace proxyattn {

using Stream = CUstream_st*;  // a cudaStream_t, declared without the CUDA headers

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16 };

// How the block counts of a head follow from the ranking: the same number in every query block, or
// as many as hold what the head needs of the proxy's attention there.
enum class BudgetMode : int32_t { kLastBlock, kTopP };

// What stands for a window of `stride` tokens: the first of them, or their mean.
enum class Pooling : int32_t { kFirst, kMean };

// Distances, in elements, between neighbours of a [batch, token, head, head_dim] tensor whose
// last dimension is contiguous.
struct TokenStrides {
  int64_t batch;
  int64_t token;
  int64_t head;
};

// The query blocks [begin, end) that one call computes. Outputs hold only these rows, so a long
// sequence can be worked through in pieces that give the same bits as one call over all of it.
struct BlockRange {
  int64_t begin;
  int64_t end;
};

// A head_dim is a multiple of the step; each of those listed has kernels of its own on a GPU.
inline constexpr int64_t kHeadDimStep = 8;
inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kHeadDims[] = {64, 128, 256};
inline constexpr int64_t kBlockSizes[] = {64, 128};
inline constexpr int64_t kStrides[] = {1, 2, 4, 8};
inline constexpr int64_t kPageSizes[] = {16, 32, 64, 128, 256};
// The CUDA selector sorts one row of key blocks inside a thread block: 1M tokens in blocks of 64.
inline constexpr int64_t kMaxCudaKvBlocks = 16384;

}  // namespace proxyattn
