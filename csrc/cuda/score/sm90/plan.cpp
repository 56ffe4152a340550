#include "cuda/score/sm90/plan.h"

#include "common/math.h"
#include "cuda/common/tensor_map.h"
#include "cuda/score/dispatch.h"
#include "cuda/sm90/key_maps.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {
namespace {

// Chunks of at most 2048 keys, and of as few as it takes to give every multiprocessor this many of
// them in a small call. Of very many keys twice as many, since a chunk loads its queries anew: on
// an H100 2 % faster at 1M tokens and up to 2 slower at 128K.
constexpr int64_t kMinChunkShift = kStretchShift;  // log2 of key tiles
constexpr int64_t kMaxChunkShift = 4;
constexpr int64_t kManyKeyTiles = 1024;
constexpr int64_t kChunksPerMultiprocessor = 8;
constexpr int64_t kMultiprocessors = 132;

// A pass takes as many lists or row tiles as keep its cells below this, but at least one row tile.
// It holds a list's peaks of 256K tokens at stride 4 in blocks of 128.
constexpr int64_t kMaxScratchBytes = int64_t{272} << 20;

constexpr int64_t kMaxCount = int64_t{1} << 30;  // kernels count with 32 bits

int64_t floor_div(int64_t numerator, int64_t denominator) {
  return numerator >= 0 ? numerator / denominator : -ceil_div(-numerator, denominator);
}

int64_t floor_log2(int64_t value) {
  int64_t power = 0;
  while (value >> power > 1) ++power;
  return power;
}

}  // namespace

ScorePlan::ScorePlan(const ScoreParams& p)
    : lists_(p.batch * p.proxy_heads),
      num_keys_(ceil_div(p.kv_len, p.stride)),
      first_limit_(floor_div(p.q_offset, p.stride) + 1),
      tile_rows_(logit_tile_rows(static_cast<int>(p.head_dim))),
      causal_(p.causal),
      with_mass_(p.mass != nullptr) {
  const int64_t num_queries = ceil_div(p.q_len, p.stride);
  const int64_t block_rows = p.q_block / p.stride;
  first_row_ = min_of(num_queries, p.rows.begin * block_rows);
  end_row_ = min_of(num_queries, p.rows.end * block_rows);
  chunk_shift_ = choose_chunk_shift(num_queries);
  // Four lanes hold at least one value each of two rows of a tile, as if it had two blocks.
  const int64_t tile_blocks = max_of<int64_t>(2, kLogitKeys * p.stride / p.kv_block);
  slot_block_bytes_ = tile_rows_ * tile_blocks * int64_t{sizeof(float)} << chunk_shift_;
  if (lists_ == 0 || num_row_tiles() == 0) return;
  choose_passes();
  bound_scratch((p.rows.end - p.rows.begin) * block_rows);
}

// Lists and row tiles in nearly even shares.
void ScorePlan::choose_passes() {
  int64_t slots = 0;  // of a list
  for (int64_t tile = 0; tile < num_row_tiles(); ++tile) slots += num_chunks(tile);
  const int64_t most_lists = most_slots() / max_of<int64_t>(1, slots);
  pass_lists_ = ceil_div(lists_, ceil_div(lists_, max_of<int64_t>(1, min_of(lists_, most_lists))));
  const int64_t list_passes = ceil_div(slots, most_slots() / pass_lists_);
  wanted_slots_ = ceil_div(slots, max_of<int64_t>(1, list_passes));
}

void ScorePlan::bound_scratch(int64_t whole_rows) {
  const int64_t row_tiles = ceil_div(whole_rows, tile_rows_);
  int64_t longest = 0;  // slots of a row tile
  int64_t slots = 0;
  for (int64_t tile = 0; tile < row_tiles; ++tile) {
    longest = chunks_seen_by(first_row_ + (tile + 1) * tile_rows_ - 1);
    slots += lists_ * longest;
  }
  const bool one_pass = slots <= most_slots();
  max_slots_ = one_pass ? slots : max_of(most_slots(), longest);
  max_passes_ = one_pass ? 1 : lists_ * row_tiles;
}

int64_t ScorePlan::most_slots() const {
  return max_of<int64_t>(1, kMaxScratchBytes / ((with_mass_ ? 2 : 1) * slot_block_bytes_));
}

int64_t ScorePlan::num_row_tiles() const {
  return ceil_div(num_rows(), tile_rows_);
}

ScorePass ScorePlan::rows_ending(int64_t end) const {
  ScorePass pass{0, 0, end - 1, end, num_chunks(end - 1)};
  while (pass.begin > 0) {
    // Row tiles that see nothing come along: a pass has something to compute, or is the only one.
    const int64_t chunks = num_chunks(pass.begin - 1);
    const int64_t slots = pass.list_slots + chunks;
    const bool full = pass.list_slots >= wanted_slots_ || slots > most_slots() / pass_lists_;
    if (full && chunks > 0) break;
    pass.list_slots = slots;
    --pass.begin;
  }
  return pass;
}

int64_t ScorePlan::num_chunks(int64_t row_tile) const {
  return chunks_seen_by(min_of(first_row_ + (row_tile + 1) * tile_rows_, end_row_) - 1);
}

// `row` counts sampled queries of the sequence.
int64_t ScorePlan::chunks_seen_by(int64_t row) const {
  return ceil_div(visible_tiles(row), int64_t{1} << chunk_shift_);
}

int64_t ScorePlan::visible_tiles(int64_t row) const {
  const int64_t keys = causal_ ? min_of(num_keys_, first_limit_ + row) : num_keys_;
  return ceil_div(max_of<int64_t>(0, keys), int64_t{kLogitKeys});
}

int64_t ScorePlan::choose_chunk_shift(int64_t num_queries) const {
  int64_t tiles = 0;
  for (int64_t row = 0; row < num_queries; row += tile_rows_) {
    tiles += visible_tiles(min_of(row + tile_rows_, num_queries) - 1);
  }
  const int64_t wanted = lists_ * tiles / (kMultiprocessors * kChunksPerMultiprocessor);
  const bool many = ceil_div(num_keys_, int64_t{kLogitKeys}) >= kManyKeyTiles;
  return max_of(kMinChunkShift, min_of(floor_log2(wanted), kMaxChunkShift + (many ? 1 : 0)));
}

bool score_fits(const ScoreParams& p) {
  if (p.kv_block / p.stride < kMinBlockKeys) return false;
  const int64_t queries = ceil_div(p.q_len, p.stride);
  const int64_t keys = ceil_div(p.kv_len, p.stride);
  const bool counted = keys > 0 && keys <= kMaxCount && queries <= kMaxCount &&
                       -kMaxCount <= p.q_offset && p.q_offset / p.stride <= kMaxCount &&
                       p.batch * p.proxy_heads <= kMaxCount;
  if (!counted ||
      !tensor_map_fits(p.q_proxy, {queries, p.head_dim, p.proxy_heads, p.batch},
                       p.q_proxy_strides) ||
      !key_maps_fit(p.k_proxy, {keys, p.head_dim, p.proxy_heads, p.batch}, p.k_proxy_strides)) {
    return false;
  }
  const ScorePlan plan(p);
  return plan.max_places() <= kMaxCount && plan.block_bytes() / int64_t{sizeof(float)} <= kMaxCount;
}

int64_t score_workspace_bytes(const ScoreParams& p) {
  return ScorePlan(p).workspace_bytes();
}

}  // namespace proxyattn::cuda::sm90
