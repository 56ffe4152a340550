// Tiles of logits q . k, [kTileRows query rows x kTileKeys keys], for kernels that want the logits
// themselves: scoring and budgets. Unscaled, fp32 sums of 16-bit products (mma.sync).
//
// A warp owns kWarpRows rows. Its query fragments stay in registers; keys stream through a ring of
// shared tiles filled by asynchronous copies, one barrier a tile. The queries pass through the same
// shared memory before the keys do. 32 rows a warp let each key fragment feed two products, which
// matters because shared memory is what mma.sync waits for; at head_dim 256 there are registers
// for 16.
//
// Rows and keys past the end are zeros in shared memory and must be masked. Key numbers are
// 32-bit, offsets in global memory 64-bit.
#pragma once

#include <cstdint>

#include "cuda/common/key_rows.cuh"
#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/ptx/address.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace proxyattn::cuda {

template <typename Element_, int kHeadDim_>
struct LogitTraits {
  using Element = Element_;
  using Tile = SharedTile<kHeadDim_>;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = 128;
  static constexpr int kHalfRows = kTileRows / 2;
  static constexpr int kTileKeys = 64;
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpLanes;
  static constexpr int kWarpRows = kTileRows / kWarps;
  static constexpr int kRowTiles = kWarpRows / 16;  // mma tiles of 16 rows
  static constexpr int kKeyTiles = kTileKeys / 8;   // mma tiles of 8 keys
  static constexpr int kSteps = kHeadDim / 16;      // products that make one logit
  static constexpr int kSlots = kHeadDim == 64 ? 4 : kHeadDim == 128 ? 3 : 2;
  static constexpr int kSlotBytes = Tile::bytes(kTileKeys);
  static constexpr int kHalfBytes = Tile::bytes(kHalfRows);
  static constexpr int kSharedBytes = kSlots * kSlotBytes;
  // Thread blocks that registers must leave room for: 168, 255 or 255 a thread.
  static constexpr int kBlocksPerSm = kHeadDim == 64 ? 3 : kHeadDim == 128 ? 2 : 1;

  static_assert(kSharedBytes >= Tile::bytes(kTileRows), "the queries pass through the ring");
  using RowLoader = TileLoader<kHalfRows, kHeadDim, kThreads>;
  using KeyLoader = TileLoader<kTileKeys, kHeadDim, kThreads>;

  // Lane l holds, of each 16 x 8 tile, rows l / 4 (elements 0, 1) and l / 4 + 8 (elements 2, 3),
  // columns 2 * (l % 4) and the next.
  using Logits = float[kRowTiles][kKeyTiles][4];
  // One value for each row of which the lane holds a part.
  using PerRow = float[kRowTiles][2];
  using RowLimits = int[kRowTiles][2];

  static PROXYATTN_DEVICE int row(int row_tile, int half) {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / kWarpLanes * kWarpRows + row_tile * 16 + half * 8 + thread % kWarpLanes / 4;
  }
  static PROXYATTN_DEVICE int column(int key_tile) {
    return key_tile * 8 + static_cast<int>(threadIdx.x) % 4 * 2;
  }
};

// 64 rows of a tensor, of which the first `valid` exist.
template <typename Element>
struct RowSource {
  const Element* first;
  int valid;
};

template <typename Traits>
class LogitTiles {
  using Element = typename Traits::Element;
  using Tile = typename Traits::Tile;

 public:
  // `shared` holds Traits::kSharedBytes at a multiple of the tile's row.
  PROXYATTN_DEVICE explicit LogitTiles(const void* shared) : ring_(ptx::shared_address(shared)) {}

  // Both halves of the query rows; collective.
  PROXYATTN_DEVICE void load_rows(const RowSource<Element>& upper,
                                  const RowSource<Element>& lower,
                                  int64_t stride,
                                  bool aligned) {
    const int thread = static_cast<int>(threadIdx.x);
    Traits::RowLoader::load(ring_, upper.first, stride, upper.valid, aligned, thread);
    Traits::RowLoader::load(ring_ + Traits::kHalfBytes, lower.first, stride, lower.valid, aligned,
                            thread);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // the rows have landed
    const int lane = thread % kWarpLanes;
    const int first_row = thread / kWarpLanes * Traits::kWarpRows;
    const uint32_t fragments = ring_ + Tile::offset(first_row + lane % 16, lane / 16);
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      PROXYATTN_UNROLL
      for (int step = 0; step < Traits::kSteps; ++step) {
        ptx::ldmatrix_x4(rows_[r][step], Tile::moved(fragments, r * 16, step * 16));
      }
    }
    __syncthreads();  // the rows are read, and the ring is free for keys
  }

  // Calls consume(logits, first key of the tile) for each tile of keys [begin, end); collective.
  // `keys` are KeyRows or the like.
  template <typename Keys, typename Consumer>
  PROXYATTN_DEVICE void for_each_tile(const Keys& keys, int begin, int end, Consumer& consume) {
    constexpr int kAhead = Traits::kSlots - 1;
    const int num_tiles = (end - begin + Traits::kTileKeys - 1) / Traits::kTileKeys;
    // Every step commits one group of copies, maybe an empty one, so that the number of groups
    // tells which tiles have landed.
    PROXYATTN_UNROLL
    for (int tile = 0; tile < kAhead; ++tile) {
      if (tile < num_tiles) load_keys(keys, begin, tile);
      ptx::cp_async_commit();
    }
    PROXYATTN_NO_UNROLL
    for (int tile = 0; tile < num_tiles; ++tile) {
      ptx::cp_async_wait<kAhead - 1>();
      __syncthreads();  // this tile has landed, and all have done with the one before
      if (tile + kAhead < num_tiles) load_keys(keys, begin, tile + kAhead);
      ptx::cp_async_commit();
      typename Traits::Logits logits;
      multiply(logits, slot(tile));
      consume(logits, begin + tile * Traits::kTileKeys);
    }
  }

 private:
  PROXYATTN_DEVICE uint32_t slot(int tile) const {
    return ring_ + static_cast<uint32_t>(tile % Traits::kSlots * Traits::kSlotBytes);
  }

  template <typename Keys>
  PROXYATTN_DEVICE void load_keys(const Keys& keys, int begin, int tile) const {
    keys.template load<typename Traits::KeyLoader>(slot(tile), begin + tile * Traits::kTileKeys,
                                                   static_cast<int>(threadIdx.x));
  }

  PROXYATTN_DEVICE void multiply(typename Traits::Logits& logits, uint32_t keys) const {
    const int lane = warp_lane();
    // Both halves of the columns of 8 keys come before the next 8 keys.
    const uint32_t fragments = keys + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    PROXYATTN_UNROLL
    for (auto& row_tile : logits) {
      for (auto& tile : row_tile) {
        for (float& logit : tile) logit = 0.0f;
      }
    }
    PROXYATTN_UNROLL
    for (int step = 0; step < Traits::kSteps; ++step) {
      PROXYATTN_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; n += 2) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, Tile::moved(fragments, n * 8, step * 16));
        PROXYATTN_UNROLL
        for (int r = 0; r < Traits::kRowTiles; ++r) {
          ptx::mma_16x8x16<Element>(logits[r][n], rows_[r][step], k[0], k[1]);
          ptx::mma_16x8x16<Element>(logits[r][n + 1], rows_[r][step], k[2], k[3]);
        }
      }
    }
  }

  uint32_t ring_;
  uint32_t rows_[Traits::kRowTiles][Traits::kSteps][4];
};

// Row (r, half) sees the keys below limits[r][half].
template <typename Traits>
PROXYATTN_DEVICE void mask_logits(typename Traits::Logits& logits,
                                  const typename Traits::RowLimits& limits,
                                  int first_key) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      PROXYATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int key = first_key + Traits::column(n) + i % 2;
        if (key >= limits[r][i / 2]) logits[r][n][i] = kMinusInfinity;
      }
    }
  }
}

// Row (r, half) sees no key below begins[r][half], where 8 keys of an mma tile begin.
template <typename Traits>
PROXYATTN_DEVICE void hide_logits_before(typename Traits::Logits& logits,
                                         const typename Traits::RowLimits& begins,
                                         int first_key) {
  PROXYATTN_UNROLL
  for (int r = 0; r < Traits::kRowTiles; ++r) {
    PROXYATTN_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; ++n) {
      PROXYATTN_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (first_key + n * 8 < begins[r][i / 2]) logits[r][n][i] = kMinusInfinity;
      }
    }
  }
}

// What exponentials are taken against, given the largest exponent: that, or 0 where there is none.
PROXYATTN_DEVICE float log2_reference(float largest) {
  return largest == kMinusInfinity ? 0.0f : largest;
}

// Running sums of exponentials of the rows, each lane over its own columns, taken against the
// largest scaled logit so far. Keys that a row doesn't see change no bit of its sum: the factor to
// a maximum that stayed the same is exactly 1.
template <typename Traits>
class RowSums {
 public:
  PROXYATTN_DEVICE RowSums() { reset(); }

  PROXYATTN_DEVICE void reset() {
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      PROXYATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        max_[r][half] = kMinusInfinity;
        sum_[r][half] = 0.0f;
      }
    }
  }

  PROXYATTN_DEVICE void add(const typename Traits::Logits& logits, float factor) {
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      PROXYATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        float largest = kMinusInfinity;
        PROXYATTN_UNROLL
        for (int n = 0; n < Traits::kKeyTiles; ++n) {
          largest = fmaxf(largest, fmaxf(logits[r][n][2 * half], logits[r][n][2 * half + 1]));
        }
        const float row_max = fmaxf(max_[r][half], largest * factor);
        const float reference = log2_reference(row_max);
        float sum = 0.0f;
        PROXYATTN_UNROLL
        for (int n = 0; n < Traits::kKeyTiles; ++n) {
          sum += softmax_weight(logits[r][n][2 * half], reference, factor);
          sum += softmax_weight(logits[r][n][2 * half + 1], reference, factor);
        }
        sum_[r][half] = fmaf(sum_[r][half], ptx::ex2(max_[r][half] - reference), sum);
        max_[r][half] = row_max;
      }
    }
  }

  // Base-2 log of the sum of 2^(factor * logit) over the row; -inf if it saw nothing. The same in
  // the four lanes of a row.
  PROXYATTN_DEVICE float log2_sum(int r, int half) const {
    const float row_max = group_max<kQuadLanes>(max_[r][half]);
    const float reference = log2_reference(row_max);
    const float rescale = ptx::ex2(max_[r][half] - reference);
    const float sum = group_sum<kQuadLanes>(sum_[r][half] * rescale);
    return sum == 0.0f ? kMinusInfinity : reference + log2f(sum);
  }

 private:
  typename Traits::PerRow max_;  // scaled, base 2
  typename Traits::PerRow sum_;
};

}  // namespace proxyattn::cuda
