// What a kernel of the family knows at compile time.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/config.h"
#include "cuda/common/element.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/tensor_map.h"

namespace proxyattn::cuda::sm90 {

template <int HeadDim, DType kDType, BlockSizes kSizes = BlockSizes::kLarge>
struct Traits {
  using Element = typename ElementOf<kDType>::Type;
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kKeyRows = tile_config(HeadDim).key_rows;
  static constexpr int kQueryStages = tile_config(HeadDim).query_stages;
  static constexpr int kKeyStages = tile_config(HeadDim).key_stages;
  static constexpr int kValueStages = tile_config(HeadDim).value_stages;
  static constexpr int kTeams = tile_config(HeadDim).teams;
  static constexpr int kBlockRows = kSizes == BlockSizes::kSmall ? kSmallBlock : kQueryRows;
  static constexpr int kHeads = kQueryRows / kBlockRows;  // of a query tile
  static constexpr bool kLargeBlocks = kSizes == BlockSizes::kLarge;
  static constexpr int kParts = tile_parts(HeadDim, kSizes);
  static constexpr int kPartRows = kKeyRows / kParts;
  static constexpr int kConsumerGroups = kTeamGroups * kTeams;
  // Of a team: the producers' warpgroup has four warps, of which each team's scout is one.
  static constexpr int kProducers = kTeams == 1 ? 2 : 1;
  static constexpr int kThreads = 128 * (kConsumerGroups + 1);
  static constexpr Overlap kOverlap = tile_config(HeadDim).overlap;

  // A tile in shared memory is a row of boxes, each kTensorBoxColumns wide and as high as the tile.
  // A query tile of two heads is two such rows, a value tile of two parts likewise; the parts of a
  // key tile lie in the same boxes, for one product to read.
  static constexpr int kBoxes = HeadDim / kTensorBoxColumns;
  static constexpr int kBoxRowBytes = kTensorBoxColumns * sizeof(Element);
  static constexpr int kQueryBoxBytes = kBlockRows * kBoxRowBytes;
  static constexpr int kKeyBoxBytes = kKeyRows * kBoxRowBytes;
  static constexpr int kHeadBytes = kBoxes * kQueryBoxBytes;
  static constexpr int kQueryTileBytes = kHeads * kHeadBytes;
  static constexpr int kKeyTileBytes = kBoxes * kKeyBoxBytes;

  static constexpr int kPartBoxBytes = kPartRows * kBoxRowBytes;
  static constexpr int kPartBytes = kBoxes * kPartBoxBytes;

  // Where a warpgroup's rows begin in a query tile.
  static PROXYATTN_DEVICE constexpr int group_bytes(int group) {
    return group * (kHeads == 1 ? kWarpgroupRows * kBoxRowBytes : kHeadBytes);
  }

  // Registers of one consumer thread.
  static constexpr int kScores = kWarpgroupRows * kKeyRows / 128;
  static constexpr int kOutputs = kWarpgroupRows * kHeadDim / 128;
  static constexpr int kProbabilities = kScores / 2;  // two 16-bit values in a register

  static_assert(kBoxRowBytes == 128, "the layout of shared memory assumes the 128-byte swizzle");
  // Registers that the warpgroups trade belong to the block since its launch, which hands out a
  // multiple of 8 a thread; asking for more than that pool holds would wait for ever.
  static constexpr int kProducerRegisters = tile_config(HeadDim).producer_registers;
  static constexpr int kConsumerRegisters = tile_config(HeadDim).consumer_registers;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(128 * (kProducerRegisters + kConsumerGroups * kConsumerRegisters) <=
                kThreads * kLaunchRegisters);
  static_assert(kKeyStages >= 2, "the producer loads key tile j + 1 before value tile j");
};

}  // namespace proxyattn::cuda::sm90
