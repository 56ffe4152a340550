// Stage 2, score_blocks, second pass: the cells of `peak` and `mass`.
//
//   peak[m, n] = ln 2 * max over rows r of block m of (max over keys u of block n of x_ru)
//   mass[m, n] = mean over rows r of block m of (sum over keys u of block n of 2^x_ru)
//   x_ru = factor * q_r . k_u - lse[r], over visible pairs;  factor = scale * log2(e)
//
// A thread block owns 128 sampled rows, which are whole query blocks, and one chunk of keys, whole
// key blocks, and computes their logits a second time rather than having stored them. Every warp
// reduces its logits to subcells of 8 x 8 by a butterfly that leaves one subcell in each lane and
// puts them into shared memory; block sizes and strides are multiples of 8, so at the end of the
// chunk the subcells are merged to cells in a fixed order and stored. Nothing is added atomically.
// What a window hides is whole cells: they are left out there.
//
// Shared memory: the ring of LogitTiles, the subcells' peaks, then their masses if wanted.
//
// NaN: a row that sees a NaN logit has lse NaN, which makes x NaN wherever the row sees a key and
// must not show where it sees none. So every maximum keeps NaN, and pairs of keys that are not
// visible are set to -inf after the subtraction.
#pragma once

#include <cstdint>

#include "cuda/common/warp.cuh"
#include "cuda/score/row_lse_kernel.cuh"

namespace proxyattn::cuda {

inline constexpr int kSubcell = 8;  // rows and keys of a subcell
// Floats between two rows of subcells beyond their number: lets a warp store to 32 banks.
inline constexpr int kSubcellPadding = 8;

PROXYATTN_HOST_DEVICE constexpr int subcell_pitch(int chunk_keys) {
  return chunk_keys / kSubcell + kSubcellPadding;
}
PROXYATTN_HOST_DEVICE constexpr int subcell_floats(int chunk_keys) {
  return kScoreTileRows / kSubcell * subcell_pitch(chunk_keys);
}

struct MaxOp {
  static constexpr float kNeutral = kMinusInfinity;
  PROXYATTN_DEVICE float operator()(float a, float b) const { return ptx::max_nan(a, b); }
};
struct SumOp {
  static constexpr float kNeutral = 0.0f;
  PROXYATTN_DEVICE float operator()(float a, float b) const { return a + b; }
};

// Halves the values that a lane holds: trades those that end in the other half of the lanes for
// the partner's sums of its own.
template <typename Op, int kHalf, int kCount>
PROXYATTN_DEVICE void scatter_step(float (&values)[kCount]) {
  const bool upper = (threadIdx.x & kHalf) != 0;
  const Op op;
  PROXYATTN_UNROLL
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i];
    const float high = values[i + kHalf];
    const float given = __shfl_xor_sync(kAllLanes, upper ? low : high, kHalf);
    values[i] = op(upper ? high : low, given);
  }
  if constexpr (kHalf > 1) scatter_step<Op, kHalf / 2>(values);
}

// Reduces each of kCount values over the warp; value i ends in the lanes l with l % kCount == i.
template <typename Op, int kCount>
PROXYATTN_DEVICE float reduce_scatter(float (&values)[kCount]) {
  static_assert(kCount <= kWarpLanes && (kCount & (kCount - 1)) == 0);
  scatter_step<Op, kCount / 2>(values);
  float value = values[0];
  PROXYATTN_UNROLL
  for (int distance = kCount; distance < kWarpLanes; distance *= 2) {
    value = Op()(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

template <typename Traits, bool kWithMass>
struct CellConsumer {
  static constexpr int kRowGroups = 2 * Traits::kRowTiles;  // of 8 rows
  static constexpr int kSubcells = kRowGroups * Traits::kKeyTiles;
  static_assert(Traits::kKeyTiles * kSubcell == Traits::kTileKeys);

  typename Traits::PerRow lse;
  typename Traits::RowLimits limits;
  int unmasked_keys;
  int begin_key;  // of the subcells' first column
  float factor;
  int pitch;
  float* peaks;  // [row groups of the thread block, pitch] in shared memory
  float* masses;

  PROXYATTN_DEVICE void operator()(typename Traits::Logits& logits, int first_key) {
    const bool masked = first_key + Traits::kTileKeys > unmasked_keys;
    if (masked) mask_logits<Traits>(logits, limits, first_key);
    float peak[kSubcells];
    float mass[kSubcells];
    PROXYATTN_UNROLL
    for (int group = 0; group < kRowGroups; ++group) {
      const int r = group / 2;
      const int half = group % 2;
      PROXYATTN_UNROLL
      for (int n = 0; n < Traits::kKeyTiles; ++n) {
        const int i = group * Traits::kKeyTiles + n;
        const float a = fmaf(logits[r][n][2 * half], factor, -lse[r][half]);
        const float b = fmaf(logits[r][n][2 * half + 1], factor, -lse[r][half]);
        peak[i] = ptx::max_nan(a, b);
        if constexpr (kWithMass) mass[i] = ptx::ex2(a) + ptx::ex2(b);
      }
    }
    if (masked) clear_hidden(peak, mass, first_key);
    store(peaks, reduce_scatter<MaxOp>(peak), first_key);
    if constexpr (kWithMass) store(masses, reduce_scatter<SumOp>(mass), first_key);
  }

  // A lane's pair of keys is hidden when the first of them is.
  PROXYATTN_DEVICE void clear_hidden(float (&peak)[kSubcells],
                                     float (&mass)[kSubcells],
                                     int first_key) const {
    PROXYATTN_UNROLL
    for (int i = 0; i < kSubcells; ++i) {
      const int group = i / Traits::kKeyTiles;
      const int key = first_key + Traits::column(i % Traits::kKeyTiles);
      const bool hidden = key >= limits[group / 2][group % 2];
      if (hidden) peak[i] = MaxOp::kNeutral;
      if (kWithMass && hidden) mass[i] = SumOp::kNeutral;
    }
  }

  PROXYATTN_DEVICE void store(float* subcells, float value, int first_key) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpLanes;
    if (lane >= kSubcells) return;
    const int group = thread / kWarpLanes * kRowGroups + lane / Traits::kKeyTiles;
    const int column = (first_key - begin_key) / kSubcell + lane % Traits::kKeyTiles;
    subcells[group * pitch + column] = value;
  }
};

// The columns of a chunk's subcells that were computed. Nobody sees the others.
struct SubcellColumns {
  int first;
  int count;
};

// Merges subcells into the cells of the tile and the chunk, a group of lanes to a cell, and calls
// write(query block, key block, value), both counted from the first ones of the tile and chunk,
// in one lane of each group.
template <typename Op, typename Write>
PROXYATTN_DEVICE void merge_subcells(const ScoreChunk& chunk,
                                     const float* subcells,
                                     const SubcellColumns& columns,
                                     int num_warps,
                                     Write& write) {
  const ScoreProblem& p = chunk.p;
  const int chunk_keys = chunk.source.chunk_keys;
  const int cell_rows = p.block_rows / kSubcell;
  const int cell_columns = p.block_keys / kSubcell;
  const int cell_size = cell_rows * cell_columns;
  const int group_lanes = min(cell_size, kWarpLanes);
  const int warp_cells = kWarpLanes / group_lanes;
  const int row_cells = chunk_keys / p.block_keys;
  const int num_cells = kScoreTileRows / p.block_rows * row_cells;
  const int pitch = subcell_pitch(chunk_keys);
  const int lane = warp_lane();
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes;
  const Op op;
  // All counts are powers of two and a warp's cells exist together, so no lane leaves early.
  for (int first = warp * warp_cells; first < num_cells; first += num_warps * warp_cells) {
    const int cell = first + lane / group_lanes;
    const int q_block = cell / row_cells;
    const int kv_block = cell % row_cells;
    const int num_columns = chunk.shows(q_block, kv_block) ? columns.count : 0;
    float value = Op::kNeutral;
    for (int i = lane % group_lanes; i < cell_size; i += group_lanes) {
      const int row = q_block * cell_rows + i / cell_columns;
      const int column = kv_block * cell_columns + i % cell_columns - columns.first;
      if (0 <= column && column < num_columns) value = op(value, subcells[row * pitch + column]);
    }
    for (int distance = 1; distance < group_lanes; distance *= 2) {
      value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    if (lane % group_lanes == 0) write(q_block, kv_block, value);
  }
}

// Stores the cells of a tile and chunk that exist.
struct CellWriter {
  const ScoreChunk& chunk;
  int64_t first_q_block;  // of the source
  int64_t first_kv_block;

  PROXYATTN_DEVICE explicit CellWriter(const ScoreChunk& chunk)
      : chunk(chunk),
        first_q_block(chunk.work.first_row / chunk.p.block_rows),
        first_kv_block(chunk.first_key() / chunk.p.block_keys) {}

  PROXYATTN_DEVICE void store(float* cells, int q_block, int kv_block, float value) const {
    const ScoreProblem& p = chunk.p;
    const ScoreSource& source = chunk.source;
    const int64_t m = first_q_block + q_block;
    const int64_t n = first_kv_block + kv_block;
    if (m >= source.num_q_blocks || n >= source.num_kv_blocks) return;
    const int64_t row = chunk.work.list * p.num_q_blocks + source.first_q_block + m;
    cells[row * p.num_kv_blocks + n] = value;
  }
};

struct PeakWriter : CellWriter {
  using CellWriter::CellWriter;
  PROXYATTN_DEVICE void operator()(int q_block, int kv_block, float value) const {
    store(chunk.p.peak, q_block, kv_block, value * kLn2);
  }
};

struct MassWriter : CellWriter {
  using CellWriter::CellWriter;
  PROXYATTN_DEVICE void operator()(int q_block, int kv_block, float value) const {
    const int64_t first = (first_q_block + q_block) * chunk.p.block_rows;
    const int64_t rows = min_of<int64_t>(chunk.p.block_rows, chunk.source.num_rows - first);
    store(chunk.p.mass, q_block, kv_block, value / static_cast<float>(rows));
  }
};

template <typename Traits, bool kWithMass>
PROXYATTN_DEVICE void run_cells_chunk(const ScoreChunk& chunk, unsigned char* shared) {
  const ScoreProblem& p = chunk.p;
  const ScoreWork& work = chunk.work;
  const ScoreSource& source = chunk.source;
  const int chunk_keys = source.chunk_keys;
  float* peaks = reinterpret_cast<float*>(shared + Traits::kSharedBytes);
  float* masses = peaks + subcell_floats(chunk_keys);
  const int begin_key = chunk.begin_key();
  const int end_key = chunk.end_key();
  SubcellColumns columns{};

  if (begin_key < end_key) {
    const ScoreTile<Traits> tile(chunk);
    LogitTiles<Traits> logits(shared);
    logits.load_rows(tile.halves[0], tile.halves[1], p.q_strides.token, p.q_aligned);
    CellConsumer<Traits, kWithMass> consumer;
    consumer.unmasked_keys = chunk.unmasked_keys();
    consumer.begin_key = begin_key;
    consumer.factor = p.factor;
    consumer.pitch = subcell_pitch(chunk_keys);
    consumer.peaks = peaks;
    consumer.masses = masses;
    find_limits<Traits>(consumer.limits, chunk);
    const float* lse = p.lse + work.list * p.lse_pitch + source.first_lse;
    PROXYATTN_UNROLL
    for (int r = 0; r < Traits::kRowTiles; ++r) {
      PROXYATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int64_t row = work.first_row + Traits::row(r, half);
        consumer.lse[r][half] = row < source.num_rows ? lse[row] : 0.0f;
      }
    }
    logits.for_each_tile(tile.keys, begin_key, end_key, consumer);
    columns = {(begin_key - chunk.first_key()) / kSubcell,
               round_up(end_key - begin_key, Traits::kTileKeys) / kSubcell};
    __syncthreads();  // all subcells are written
  }

  PeakWriter write_peak(chunk);
  merge_subcells<MaxOp>(chunk, peaks, columns, Traits::kWarps, write_peak);
  if constexpr (kWithMass) {
    MassWriter write_mass(chunk);
    merge_subcells<SumOp>(chunk, masses, columns, Traits::kWarps, write_mass);
  }
}

template <typename Element, int kHeadDim, bool kWithMass, bool kPacked>
__global__ void __launch_bounds__(LogitTraits<Element, kHeadDim>::kThreads,
                                  LogitTraits<Element, kHeadDim>::kBlocksPerSm)
    score_cells_kernel(const __grid_constant__ ScoreProblem p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  for_each_chunk<kPacked>(p, [&](const ScoreChunk& chunk) {
    run_cells_chunk<LogitTraits<Element, kHeadDim>, kWithMass>(chunk, shared);
  });
}

}  // namespace proxyattn::cuda
