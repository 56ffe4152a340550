// The two matrix products of attention on one key tile, for the rows of one warp:
//   scores[rows x keys] = Q K^T        sums[rows x head_dim] += P V
//
// Operands come from swizzled shared tiles through ldmatrix. K is read as it lies: its rows are
// the columns of K^T. V is read transposed. P stays in registers: two accumulator tiles side by
// side, rounded to pairs, are a left operand.
#pragma once

#include <cstdint>

#include "cuda/attention/sm80/traits.h"
#include "cuda/common/macros.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/ptx/mma.cuh"

namespace proxyattn::cuda::sm80 {

// Where lane l points ldmatrix for a [16 rows x 16 columns] fragment at the tile's corner: rows
// l % 16, columns 8 * (l / 16). Serves Q, and V whose matrices are transposed on the way.
template <typename Tile>
PROXYATTN_DEVICE uint32_t row_fragment_offset(int lane) {
  return Tile::offset(lane % 16, lane / 16);
}

// The same for K, where both halves of the columns of 8 keys come before the next 8 keys.
template <typename Tile>
PROXYATTN_DEVICE uint32_t key_fragment_offset(int lane) {
  return Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}

// `queries` and `keys` are this lane's fragment addresses in the warp's query rows and the tile.
template <typename Traits>
PROXYATTN_DEVICE void compute_scores(typename Traits::Scores& scores,
                                     uint32_t queries,
                                     uint32_t keys) {
  using Tile = typename Traits::Tile;
  PROXYATTN_UNROLL
  for (auto& row_tile : scores) {
    for (auto& tile : row_tile) {
      for (float& score : tile) score = 0.0f;
    }
  }
  PROXYATTN_UNROLL
  for (int column = 0; column < Traits::kHeadDim; column += 16) {
    uint32_t q[Traits::kRowTiles][4];
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      ptx::ldmatrix_x4(q[r], Tile::moved(queries, r * 16, column));
    }
    PROXYATTN_UNROLL
    for (int n = 0; n < Traits::kKeyTiles; n += 2) {
      uint32_t k[4];
      ptx::ldmatrix_x4(k, Tile::moved(keys, n * 8, column));
      PROXYATTN_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        ptx::mma_16x8x16<typename Traits::Element>(scores[r][n], q[r], k[0], k[1]);
        ptx::mma_16x8x16<typename Traits::Element>(scores[r][n + 1], q[r], k[2], k[3]);
      }
    }
  }
}

// `values` is this lane's fragment address in the tile.
template <typename Traits>
PROXYATTN_DEVICE void accumulate(typename Traits::Sums& sums,
                                 const typename Traits::Weights& weights,
                                 uint32_t values) {
  using Tile = typename Traits::Tile;
  PROXYATTN_UNROLL
  for (int n = 0; n < kTileKeys; n += 16) {
    PROXYATTN_UNROLL
    for (int d = 0; d < Traits::kDimTiles; d += 2) {
      uint32_t v[4];
      ptx::ldmatrix_x4_trans(v, Tile::moved(values, n, d * 8));
      PROXYATTN_UNROLL
      for (int r = 0; r < Traits::kRowTiles; ++r) {
        ptx::mma_16x8x16<typename Traits::Element>(sums[r][d], weights[r][n / 16], v[0], v[1]);
        ptx::mma_16x8x16<typename Traits::Element>(sums[r][d + 1], weights[r][n / 16], v[2], v[3]);
      }
    }
  }
}

}  // namespace proxyattn::cuda::sm80
