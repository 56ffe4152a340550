// Stage 2, score_blocks, second kernel: from what score_kernel left in scratch to cells.
//
//   lse[r]     = log2 of the sum over stretches of keys of 2^stretch_lse[r]
//   peak[m, n] = ln 2 * max over rows r of block m of (factor * block_max[r, n] - lse[r])
//   mass[m, n] = mean over rows r of block m of 2^(block_lse[r, n] - lse[r])
//
// A thread block owns one query block of one list and up to kFinishCells of its cells. A warp makes
// kStepCells or fewer at a time: kLaneCells in each lane, reduced over the eight lanes that hold
// different rows by a butterfly that leaves one in each. Scratch is read once, in whole lines.
// Shared memory: lse of the rows.
//
// NaN: a row that sees a NaN has lse NaN, which must show in every cell that the row sees and in no
// other. So maxima keep NaN, and what a row does not see is left out by number, not by value.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/score/sm90/cells.cuh"
#include "cuda/score/sm90/problem.h"

namespace proxyattn::cuda::sm90 {

inline constexpr int kFinishThreads = 256;
inline constexpr int kFinishWarps = kFinishThreads / kWarpLanes;
inline constexpr int kFinishBlocksPerSm = 4;
inline constexpr int kFinishCells = 1024;  // of a thread block
inline constexpr int kMaxBlockRows = 128;

struct PeakCell {
  static constexpr float kNeutral = kMinusInfinity;
  float factor;

  PROXYATTN_DEVICE float value(float block_max, float lse) const {
    return fmaf(block_max, factor, -lse);
  }
  PROXYATTN_DEVICE float merge(float a, float b) const { return ptx::max_nan(a, b); }
  PROXYATTN_DEVICE float result(float merged) const { return merged * kLn2; }
};

struct MassCell {
  static constexpr float kNeutral = 0.0f;
  float rows;  // of the query block

  PROXYATTN_DEVICE float value(float block_lse, float lse) const {
    return ptx::ex2(block_lse - lse);
  }
  PROXYATTN_DEVICE float merge(float a, float b) const { return a + b; }
  PROXYATTN_DEVICE float result(float merged) const { return merged / rows; }
};

template <int kBlockKeys>
class ScoreFinisher {
  using Blocks = LaneBlocks<kBlockKeys>;
  static constexpr int kTileCells = Blocks::kBlocks;      // of one key tile in a lane
  static constexpr int kLaneCells = 8;                    // one for each row of eight
  static constexpr int kTiles = kLaneCells / kTileCells;  // key tiles at a time
  static constexpr int kStepCells = kTiles * Blocks::kTileBlocks;
  static_assert(kFinishCells % kStepCells == 0);

 public:
  // `tile` counts row tiles of all lists, `block` query blocks of the row tile.
  PROXYATTN_DEVICE ScoreFinisher(const ScoreProblem& p, float* lse, int tile, int block)
      : p_(p), lse_(lse), lane_(warp_lane()) {
    const int sequence = find_sequence(tile);
    const ScoreSlots slots = p.slots_of(sequence);
    const ScoreSpan span = p.span_of(sequence);
    const int head = (tile - slots.first_tile) / slots.list_tiles;
    const int row_tile = slots.list_tiles - 1 - (tile - slots.first_tile) % slots.list_tiles;
    first_slot_ = slots.first_slot + head * slots.list_slots - p.pass_begin +
                  slots_behind(span, row_tile, slots.list_tiles);
    end_tile_ = p.visible_tiles(span, row_tile);
    block_row_ = block * p.block_rows;
    const int first_row = row_tile * p.tile_rows + block_row_;
    const int q_block = first_row / p.block_rows;
    num_keys_ = span.num_keys;
    limit_ = p.causal ? span.first_limit + first_row : span.num_keys;
    const bool is_scored = q_block >= p.first_scored_block(sequence * p.proxy_heads + head);
    rows_ = is_scored ? min(p.block_rows, span.num_rows - first_row) : 0;
    const int64_t list = static_cast<int64_t>(span.batch) * p.proxy_heads + head;
    out_ = (list * p.num_q_blocks + span.first_block + q_block) * p.num_kv_blocks;
  }

  PROXYATTN_DEVICE void run(int first_cell) {
    if (rows_ <= 0) return;  // a ragged row tile, or nobody asks
    find_lse();
    __syncthreads();  // lse is written
    const int end = ceil_div(min(first_cell + kFinishCells, p_.num_kv_blocks), kStepCells);
    const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
    for (int step = first_cell / kStepCells + warp; step < end; step += kFinishWarps) {
      write(step * kTiles, p_.block_max, PeakCell{p_.factor}, p_.peak + out_);
      if (p_.mass != nullptr) {
        write(step * kTiles, p_.block_lse, MassCell{static_cast<float>(rows_)}, p_.mass + out_);
      }
    }
  }

 private:
  // Whose lists the row tile is of. All warps find it for themselves, like what follows.
  PROXYATTN_DEVICE int find_sequence(int tile) const {
    if (!p_.is_packed()) return tile / (p_.proxy_heads * p_.entry_slots.list_tiles);
    int begin = 0;
    for (int end = p_.num_sequences; end - begin > 1;) {
      const int middle = (begin + end) / 2;
      (p_.slots[middle].first_tile <= tile ? begin : end) = middle;
    }
    return begin;
  }

  // Keys that a row of the query block sees.
  PROXYATTN_DEVICE int visible_keys(int row) const { return max(0, min(num_keys_, limit_ + row)); }

  // Slots that come before a row tile's in its list.
  PROXYATTN_DEVICE int slots_behind(const ScoreSpan& span, int row_tile, int row_tiles) const {
    int slots = 0;
    for (int tile = row_tile + 1 + lane_; tile < row_tiles; tile += kWarpLanes) {
      slots += p_.num_chunks(span, tile);
    }
    return group_sum<kWarpLanes>(slots);
  }

  // The partial sums of a row's stretches, in order.
  PROXYATTN_DEVICE void find_lse() {
    constexpr int kLoads = 8;  // in flight
    const int row = static_cast<int>(threadIdx.x);
    if (row >= rows_) return;
    const int num_stretches = ceil_div(end_tile_, kStretchTiles);
    const float* stretch_lse =
        p_.stretch_lse + static_cast<int64_t>(first_slot_ * p_.chunk_stretches()) * p_.tile_rows +
        block_row_ + row;
    float largest = kMinusInfinity;
    float sum = 0.0f;
    for (int first = 0; first < num_stretches; first += kLoads) {
      float lse[kLoads];
      float seen = largest;
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        lse[i] = first + i < num_stretches
                     ? stretch_lse[static_cast<int64_t>(first + i) * p_.tile_rows]
                     : kMinusInfinity;
      }
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) seen = fmaxf(seen, lse[i]);
      const float reference = seen == kMinusInfinity ? 0.0f : seen;
      sum *= ptx::ex2(largest - reference);
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) sum += ptx::ex2(lse[i] - reference);
      largest = seen;
    }
    const float reference = largest == kMinusInfinity ? 0.0f : largest;
    lse_[row] = sum == 0.0f ? kMinusInfinity : reference + log2f(sum);
  }

  template <typename Cell>
  PROXYATTN_DEVICE void write(int first_tile, const float* scratch, const Cell& cell, float* out) {
    float values[kLaneCells];
    PROXYATTN_UNROLL
    for (float& value : values) value = Cell::kNeutral;
    if (first_tile < end_tile_) {
      // Whole: every row sees every key of these tiles, and row groups have no other rows.
      const int tiles_end = first_tile + kTiles;
      const bool whole = rows_ % kRowGroup == 0 && tiles_end <= end_tile_ &&
                         tiles_end * kLogitKeys <= visible_keys(0);
      if (whole) {
        gather<true>(first_tile, scratch, cell, values);
      } else {
        gather<false>(first_tile, scratch, cell, values);
      }
      merge_rows<kLaneCells / 2>(cell, values);
    }
    float value = values[0];
    // Where a lane holds one row of a block, its neighbour holds the other.
    if constexpr (!Blocks::kBothRows) {
      value = cell.merge(value, __shfl_xor_sync(kAllLanes, value, 1));
    }
    const int mine = lane_ / kQuadLanes;
    const int tile = first_tile + mine / kTileCells;
    const int block = tile * Blocks::kTileBlocks + Blocks::block(lane_, mine % kTileCells);
    // One of the lanes that share a block.
    const bool writes = lane_ * Blocks::kTileBlocks * kTileCells % kQuadLanes == 0;
    if (writes && block < p_.num_kv_blocks) out[block] = cell.result(value);
  }

  // Adds the rows of the query block that the lane holds.
  template <bool kWhole, typename Cell>
  PROXYATTN_DEVICE void gather(int first_tile,
                               const float* scratch,
                               const Cell& cell,
                               float (&values)[kLaneCells]) const {
    const int tile_floats = p_.tile_rows / kRowGroup * kGroupFloats<kBlockKeys>;
    const int end_group = ceil_div(block_row_ + rows_, kRowGroup);
    const float* tiles =
        scratch + static_cast<int64_t>(first_slot_ * p_.chunk_tiles() + first_tile) * tile_floats +
        lane_ * Blocks::kCount;
    PROXYATTN_NO_UNROLL
    for (int group = block_row_ / kRowGroup; group < end_group; ++group) {
      typename Blocks::Merged loaded[kTiles];
      PROXYATTN_UNROLL
      for (int t = 0; t < kTiles; ++t) {
        if (!kWhole && first_tile + t >= end_tile_) break;
        load_values(tiles + t * tile_floats + group * kGroupFloats<kBlockKeys>, loaded[t]);
      }
      add_group<kWhole>(first_tile, group * kRowGroup + lane_ / kQuadLanes - block_row_, loaded,
                        cell, values);
    }
  }

  // `row` is the lane's first, counted from the query block's first.
  template <bool kWhole, typename Cell>
  PROXYATTN_DEVICE void add_group(int first_tile,
                                  int row,
                                  const typename Blocks::Merged (&loaded)[kTiles],
                                  const Cell& cell,
                                  float (&values)[kLaneCells]) const {
    PROXYATTN_UNROLL
    for (int half = 0; half < (Blocks::kBothRows ? 2 : 1); ++half) {
      const int my_row = row + 8 * Blocks::row(lane_, half);
      const bool exists = kWhole || (0 <= my_row && my_row < rows_);
      const float lse = exists ? lse_[my_row] : 0.0f;
      const int limit = exists ? visible_keys(my_row) : 0;
      PROXYATTN_UNROLL
      for (int i = 0; i < kLaneCells; ++i) {
        const int t = i / kTileCells;
        const int cell_idx = i % kTileCells;
        const int first_key =
            (first_tile + t) * kLogitKeys + Blocks::block(lane_, cell_idx) * kBlockKeys;
        if (kWhole || first_key < limit) {
          values[i] = cell.merge(values[i], cell.value(loaded[t][2 * cell_idx + half], lse));
        }
      }
    }
  }

  // Reduces each value over the eight lanes with other rows; value i ends in lanes l, l / 4 == i.
  template <int kHalf, typename Cell>
  PROXYATTN_DEVICE void merge_rows(const Cell& cell, float (&values)[kLaneCells]) const {
    const bool upper = (lane_ & 4 * kHalf) != 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < kHalf; ++i) {
      const float kept = upper ? values[i + kHalf] : values[i];
      const float given = upper ? values[i] : values[i + kHalf];
      values[i] = cell.merge(kept, __shfl_xor_sync(kAllLanes, given, 4 * kHalf));
    }
    if constexpr (kHalf > 1) merge_rows<kHalf / 2>(cell, values);
  }

  const ScoreProblem& p_;
  float* lse_;  // of the query block's rows, in shared memory
  int lane_;
  int first_slot_;  // of the row tile
  int end_tile_;    // key tiles that were computed
  int num_keys_;    // of the sequence
  int limit_;       // keys that the query block's first row sees, if there are so many
  int block_row_;   // first row of the query block, in the row tile
  int rows_;        // of the query block; none: it is not there, or its scores are not wanted
  int64_t out_;
};

// Grid: row tiles of the pass on x, times parts of a row of cells; query blocks of a row tile on y.
// How many row tiles of packed sequences a pass has the device knows: thread blocks walk them.
template <int kBlockKeys>
__global__ void __launch_bounds__(kFinishThreads, kFinishBlocksPerSm)
    finish_scores_kernel(const __grid_constant__ ScoreProblem problem, int num_parts) {
  __shared__ float lse[kMaxBlockRows];
  const int begin = problem.is_packed() ? problem.pass_tiles[0] : problem.tiles_begin;
  const int end = problem.is_packed() ? problem.pass_tiles[1] : problem.tiles_end;
  const int part = static_cast<int>(blockIdx.x) % num_parts;
  const int step = static_cast<int>(gridDim.x) / num_parts;
  for (int tile = begin + static_cast<int>(blockIdx.x) / num_parts; tile < end; tile += step) {
    ScoreFinisher<kBlockKeys>(problem, lse, tile, static_cast<int>(blockIdx.y))
        .run(part * kFinishCells);
    __syncthreads();  // lse has been read
  }
}

}  // namespace proxyattn::cuda::sm90
