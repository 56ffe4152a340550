#include "cuda/score/sm90/plan.h"

#include "common/math.h"
#include "cuda/common/tensor_map.h"
#include "cuda/score/dispatch.h"
#include "cuda/sm90/logit_config.h"

namespace proxyattn::cuda::sm90 {
namespace {

// Chunks of at most 2048 keys, and of as few as it takes to give every multiprocessor this many of
// them in a small call.
constexpr int64_t kMinChunkTiles = 2;
constexpr int64_t kMaxChunkTiles = 16;
constexpr int64_t kChunksPerMultiprocessor = 8;
constexpr int64_t kMultiprocessors = 132;

// A pass takes as many row tiles as keep scratch below this, but at least one.
constexpr int64_t kMaxScratchBytes = int64_t{256} << 20;

constexpr int64_t kMaxCount = int64_t{1} << 30;  // kernels count with 32 bits

constexpr int64_t kRowGroup = 16;  // rows whose values lie together, see cells.cuh

int64_t floor_div(int64_t numerator, int64_t denominator) {
  return numerator >= 0 ? numerator / denominator : -ceil_div(-numerator, denominator);
}

int64_t power_of_two_at_most(int64_t value) {
  int64_t power = 1;
  while (2 * power <= value) power *= 2;
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
  chunk_tiles_ = choose_chunk_tiles(num_queries);
  // A lane holds at least one value of a tile, as if it had two blocks.
  const int64_t tile_blocks = max_of<int64_t>(2, kLogitKeys * p.stride / p.kv_block);
  item_block_bytes_ =
      chunk_tiles_ * (tile_rows_ / kRowGroup) * (kRowGroup * tile_blocks) * int64_t{sizeof(float)};
  if (lists_ == 0) return;
  for (int64_t end = num_row_tiles(); end > 0;) {
    const ScorePass pass = pass_ending(end);
    max_items_ = max_of(max_items_, lists_ * pass.list_items);
    ++num_passes_;
    end = pass.begin;
  }
}

int64_t ScorePlan::num_row_tiles() const {
  return ceil_div(num_rows(), tile_rows_);
}

ScorePass ScorePlan::pass_ending(int64_t end) const {
  const int64_t item_bytes = (with_mass_ ? 2 : 1) * item_block_bytes_;
  const int64_t most_items = kMaxScratchBytes / (lists_ * item_bytes);
  ScorePass pass{end - 1, end, num_chunks(end - 1)};
  while (pass.begin > 0) {
    const int64_t items = pass.list_items + num_chunks(pass.begin - 1);
    if (items > most_items) break;
    pass.list_items = items;
    --pass.begin;
  }
  return pass;
}

int64_t ScorePlan::lse_bytes() const {
  return max_items_ * tile_rows_ * int64_t{sizeof(float)};
}

int64_t ScorePlan::workspace_bytes() const {
  return (with_mass_ ? 2 : 1) * block_bytes() + lse_bytes() + counter_bytes();
}

// `last_row` counts sampled queries of the sequence.
int64_t ScorePlan::visible_tiles(int64_t last_row) const {
  const int64_t keys = causal_ ? min_of(num_keys_, first_limit_ + last_row) : num_keys_;
  return ceil_div(max_of<int64_t>(0, keys), int64_t{kLogitKeys});
}

int64_t ScorePlan::num_chunks(int64_t row_tile) const {
  const int64_t last_row = min_of(first_row_ + (row_tile + 1) * tile_rows_, end_row_) - 1;
  return ceil_div(visible_tiles(last_row), chunk_tiles_);
}

// Depends on the whole sequence, never on the rows asked for: a row's bits hang on its chunks.
int64_t ScorePlan::choose_chunk_tiles(int64_t num_queries) const {
  int64_t tiles = 0;
  for (int64_t row = 0; row < num_queries; row += tile_rows_) {
    tiles += visible_tiles(min_of(row + tile_rows_, num_queries) - 1);
  }
  const int64_t wanted = lists_ * tiles / (kMultiprocessors * kChunksPerMultiprocessor);
  return power_of_two_at_most(max_of(kMinChunkTiles, min_of(wanted, kMaxChunkTiles)));
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
      !tensor_map_fits(p.k_proxy, {keys, p.head_dim, p.proxy_heads, p.batch}, p.k_proxy_strides)) {
    return false;
  }
  const ScorePlan plan(p);
  return plan.max_places() <= kMaxCount && plan.block_bytes() / int64_t{sizeof(float)} <= kMaxCount;
}

int64_t score_workspace_bytes(const ScoreParams& p) {
  return ScorePlan(p).workspace_bytes();
}

}  // namespace proxyattn::cuda::sm90
