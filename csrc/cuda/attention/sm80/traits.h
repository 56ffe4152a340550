// Types and counts that follow from head_dim, element type and tile rows.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

#include "cuda/attention/sm80/config.h"
#include "cuda/common/element.cuh"
#include "cuda/common/tile.cuh"

namespace proxyattn::cuda::sm80 {

template <int kHeadDim_, DType kDType, int kTileRows_>
struct Traits {
  using Element = typename ElementOf<kDType>::Type;
  using Tile = SharedTile<kHeadDim_>;
  using QueryLoader = TileLoader<kTileRows_, kHeadDim_, kThreads>;
  using KeyLoader = TileLoader<kTileKeys, kHeadDim_, kThreads>;

  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kWarpRows = kTileRows / kWarps;
  static constexpr int kRowTiles = kWarpRows / 16;  // mma tiles of 16 rows
  static constexpr int kKeyTiles = kTileKeys / 8;   // mma tiles of 8 keys
  static constexpr int kDimTiles = kHeadDim / 8;    // mma tiles of 8 head_dim columns
  static constexpr int kSlots = num_slots(kTileRows);
  static constexpr int kSlotBytes = Tile::bytes(kTileKeys);
  static constexpr int kQueryBytes = Tile::bytes(kTileRows);
  static constexpr int kTileBytes = kQueryBytes + kSlots * kSlotBytes;
  static constexpr int kSharedBytes = shared_bytes(kHeadDim, kTileRows);
  static constexpr int kBlocksPerSm = blocks_per_sm(kHeadDim, kTileRows);

  static_assert(kSharedBytes == kTileBytes + kBlockWorkBytes);
  static_assert(kWarpRows % 16 == 0 && kTileKeys % 16 == 0 && kHeadDim % 16 == 0);

  // Accumulators of a warp. Lane l holds, of each 16 x 8 tile, rows l / 4 (elements 0, 1) and
  // l / 4 + 8 (elements 2, 3), columns 2 * (l % 4) and the next.
  using Scores = float[kRowTiles][kKeyTiles][4];
  // The same numbers as left operands of 16 x 16, two rounded neighbours to a register.
  using Weights = uint32_t[kRowTiles][kTileKeys / 16][4];
  using Sums = float[kRowTiles][kDimTiles][4];
  // One value for each row of which the lane holds a part.
  using PerRow = float[kRowTiles][2];
};

}  // namespace proxyattn::cuda::sm80
