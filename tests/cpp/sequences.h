// Packed sequences of given lengths and their table, for the C++ tests.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "proxyattn/sequences.h"

#include "common/math.h"
#include "common/sequence.h"

namespace proxyattn::test {

struct Lengths {
  int32_t q;
  int32_t kv;
};

// What prepare_sequences makes of sequences that lie one behind another, `spare` things of each
// kind beyond what they need in the capacities.
class PackedTable {
 public:
  PackedTable(const std::vector<Lengths>& lengths,
              int64_t q_block,
              int64_t kv_block,
              int64_t stride,
              int64_t spare = 0) {
    params.count = static_cast<int64_t>(lengths.size());
    params.q_block = q_block;
    params.kv_block = kv_block;
    params.stride = stride;
    params.packed.total_q = spare;
    params.packed.max_total_kv = spare;
    for (const Lengths& length : lengths) {
      params.packed.total_q += length.q;
      params.packed.max_total_kv += length.kv;
      params.max_q_len = std::max<int64_t>(params.max_q_len, length.q);
      params.max_kv_len = std::max<int64_t>(params.max_kv_len, length.kv);
    }
    params.packed.table_stride = stride;
    memory_.resize(static_cast<std::size_t>(SequenceTable::bytes(params) + 15) / 16);
    params.packed.table = params.table = memory_.data();
    table = SequenceTable(params.table, params);
    fill(lengths);
  }

  const Sequence& operator[](std::size_t i) const { return table.sequences[i]; }

  SequenceParams params{};
  SequenceTable table;

 private:
  struct alignas(16) Chunk {
    int32_t words[4];
  };

  void fill(const std::vector<Lengths>& lengths) {
    Sequence next{};
    std::fill_n(table.block_sequence, table.max_q_blocks, table.count);
    std::fill_n(table.unit_sequence, table.max_key_units, table.count);
    for (const Lengths& length : lengths) {
      next.q_len = length.q;
      next.kv_len = length.kv;
      next.offset = length.kv - length.q;
      table.sequences[next.idx] = next;
      const auto blocks = ceil_div(length.q, static_cast<int32_t>(params.q_block));
      const auto units = ceil_div(length.kv, static_cast<int32_t>(params.stride * kWindowUnit));
      std::fill_n(table.block_sequence + next.first_q_block, blocks, next.idx);
      std::fill_n(table.unit_sequence + next.first_key_unit, units, next.idx);
      next.q_start += length.q;
      next.kv_start += length.kv;
      next.first_q_block += blocks;
      next.first_kv_block += ceil_div(length.kv, static_cast<int32_t>(params.kv_block));
      next.first_key_unit += units;
      ++next.idx;
    }
    std::iota(table.order, table.order + table.count, 0);
    std::stable_sort(table.order, table.order + table.count, [this](int32_t a, int32_t b) {
      return table.sequences[a].kv_len > table.sequences[b].kv_len;
    });
    int32_t before = 0;
    for (int32_t i = 0; i <= table.count; ++i) {
      table.blocks_before[i] = before;
      if (i == table.count) break;
      const int32_t queries = table.sequences[table.order[i]].q_len;
      before += ceil_div(queries, static_cast<int32_t>(params.q_block));
    }
  }

  std::vector<Chunk> memory_;
};

// Lengths at and around multiples of 128, and nothing at all.
inline std::vector<Lengths> mixed_lengths() {
  return {{0, 0},     {1, 1},  {128, 128}, {0, 300},  {129, 700},
          {200, 130}, {64, 0}, {65, 4097}, {300, 64}, {0, 0}};
}

}  // namespace proxyattn::test
