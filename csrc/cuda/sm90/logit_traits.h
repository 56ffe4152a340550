// What a kernel that works on logits knows at compile time.
#pragma once

#include <cstdint>

#include "cuda/common/element.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {

inline constexpr int kLogitSharedBytes = 232448;  // a block's limit on compute capability 9.0

template <int HeadDim, DType kDType>
struct LogitTraits {
  using Element = typename ElementOf<kDType>::Type;
  static constexpr LogitConfig kConfig = logit_config(HeadDim);
  static constexpr int kHeadDim = HeadDim;
  static constexpr int kGroups = kConfig.groups;
  static constexpr int kConsumerWarps = 4 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);  // the producer's warpgroup is the first
  static constexpr int kQueryStages = kConfig.query_stages;
  static constexpr int kKeyStages = kConfig.key_stages;
  static constexpr int kProducerRegisters = kConfig.producer_registers;
  static constexpr int kConsumerRegisters = kConfig.consumer_registers;
  static constexpr int kTileRows = logit_tile_rows(HeadDim);

  // In shared memory a warpgroup's rows or a key tile are a row of boxes of 64 columns.
  static constexpr int kBoxes = HeadDim / kTensorBoxColumns;
  static constexpr int kBoxRowBytes = kTensorBoxColumns * sizeof(Element);
  static constexpr int kQueryBoxBytes = kGroupRows * kBoxRowBytes;
  static constexpr int kKeyBoxBytes = kLogitKeys * kBoxRowBytes;
  static constexpr int kGroupBytes = kBoxes * kQueryBoxBytes;
  static constexpr int kQueryTileBytes = kGroups * kGroupBytes;
  static constexpr int kKeyTileBytes = kBoxes * kKeyBoxBytes;

  static constexpr int kLogits = kGroupRows * kLogitKeys / 128;  // of one thread, a product

  static_assert(kBoxRowBytes == 128, "the layout of shared memory assumes the 128-byte swizzle");
  // Registers that the warpgroups trade belong to the block since its launch, which hands out a
  // multiple of 8 a thread; asking for more than that pool holds would wait for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(128 * (kProducerRegisters + kGroups * kConsumerRegisters) <=
                kThreads * kLaunchRegisters);
};

}  // namespace proxyattn::cuda::sm90
