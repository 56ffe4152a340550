// The stages as a GPU runs them over packed sequences, each by the CPU's own on one sequence after
// another: everything lies where the table and the params say. Their scratch is overwritten, so
// that nothing that is needed may lie there.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/block_grid.h"
#include "common/sequence.h"
#include "common/tokens.h"
#include "cpu/stages.h"
#include "cuda/sequences/packed.h"
#include "tensors.h"

namespace proxyattn::test {

// The call of one sequence alone that does its part.
template <typename Params>
Params alone(const Params& p, const Sequence& s) {
  Params own = p;
  own.packed = {};
  own.batch = 1;
  own.q_len = s.q_len;
  own.kv_len = s.kv_len;
  return own;
}

template <typename Params>
void place_tensors(const Params& p, const Sequence& s, Params* own) {
  own->q = from_token(p.q, p.q_strides, s.q_start, p.dtype);
  own->k = from_token(p.k, p.k_strides, s.kv_start, p.dtype);
}

template <typename Params>
void overwrite_scratch(const Params& p) {
  std::memset(p.workspace, 0xff, static_cast<std::size_t>(p.workspace_bytes));
}

template <typename Params, typename Body>
void for_each_sequence(const Params& p, const Body& body) {
  const SequenceTable table = cuda::packed_table(p);
  for (int32_t i = 0; i < table.count; ++i) body(table.sequences[i]);
}

struct PackedStages {
  static constexpr int64_t kScratchBytes = 1000;
  static int64_t score_workspace(const ScoreParams&) { return kScratchBytes; }
  static int64_t needs_workspace(const NeedParams&) { return kScratchBytes; }
  static int64_t attention_workspace(const AttentionParams&) { return kScratchBytes; }

  static void prepare(const SequenceParams& p) {
    const SequenceTable table(p.table, p);
    const auto begin = static_cast<int32_t>(p.packed.blocks.begin);
    SequenceReader reader(p.packed, sequence_limits(p.packed, p.max_q_len, p.max_kv_len),
                          p.q_block);
    int64_t units = 0;
    std::fill_n(table.block_sequence, table.max_q_blocks, table.count);
    std::fill_n(table.unit_sequence, table.max_key_units, table.count);
    for (int32_t i = 0; i < table.count; ++i) {
      Sequence s = cut_to_blocks(reader.next(), begin, begin + table.max_q_blocks,
                                 static_cast<int32_t>(p.q_block));
      s.first_key_unit = static_cast<int32_t>(units);
      units += ceil_div<int64_t>(s.kv_len, p.stride * kWindowUnit);
      table.sequences[i] = s;
      std::fill_n(table.block_sequence + s.first_q_block, ceil_div<int64_t>(s.q_len, p.q_block), i);
    }
  }

  static void pool(const PoolParams& p) {
    for_each_sequence(p, [&](const Sequence& s) {
      PoolParams own = alone(p, s);
      place_tensors(p, s, &own);
      if (p.kv_len == 0) own.kv_len = 0;
      own.q_proxy = from_token(p.q_proxy, p.q_proxy_strides,
                               s.first_q_block * (p.q_block / p.stride), p.dtype);
      own.k_proxy =
          from_token(p.k_proxy, p.k_proxy_strides, s.first_key_unit * kWindowUnit, p.dtype);
      cpu::pool_heads(own);
    });
  }

  static void needs(const NeedParams& p) {
    overwrite_scratch(p);
    for_each_sequence(p, [&](const Sequence& s) {
      NeedParams own = alone(p, s);
      place_tensors(p, s, &own);
      own.q_offset = s.offset;
      if (p.budgets != nullptr) own.budgets = p.budgets + s.idx * p.q_heads;
      if (p.shares != nullptr) own.shares = p.shares + s.idx * p.q_heads;
      const Workspace workspace(own, cpu::estimate_needs_workspace_bytes(own));
      cpu::run_needs(own);
    });
  }

  static void score(const ScoreParams& p) {
    overwrite_scratch(p);
    for_each_sequence(p, [&](const Sequence& s) {
      ScoreParams own = alone(p, s);
      own.q_offset = s.offset;
      own.rows = {0, ceil_div(own.q_len, own.q_block)};
      own.q_proxy = from_token(p.q_proxy, p.q_proxy_strides,
                               s.first_q_block * (p.q_block / p.stride), p.dtype);
      own.k_proxy =
          from_token(p.k_proxy, p.k_proxy_strides, s.first_key_unit * kWindowUnit, p.dtype);
      const Cells cells(p.proxy_heads, own.rows.end, ceil_div(own.kv_len, own.kv_block));
      std::vector<float> peak(cells.size());
      std::vector<float> mass(cells.size());
      own.peak = peak.data();
      own.mass = p.mass == nullptr ? nullptr : mass.data();
      const Workspace workspace(own, cpu::score_blocks_workspace_bytes(own));
      cpu::run_score(own);
      const Cells all(p.proxy_heads, p.rows.end - p.rows.begin, ceil_div(p.kv_len, p.kv_block));
      all.copy_in(cells, s.first_q_block, peak.data(), p.peak);
      if (p.mass != nullptr) all.copy_in(cells, s.first_q_block, mass.data(), p.mass);
    });
  }

  static void select(const SelectParams& p) {
    for_each_sequence(p, [&](const Sequence& s) {
      SelectParams own = alone(p, s);
      own.q_offset = s.offset;
      own.rows = {0, ceil_div(own.q_len, own.q_block)};
      own.list_rows = {p.list_rows.begin - s.first_q_block, p.list_rows.end - s.first_q_block};
      const Cells cells(p.proxy_heads, own.rows.end, ceil_div(own.kv_len, own.kv_block));
      const Cells all(p.proxy_heads, p.rows.end - p.rows.begin, ceil_div(p.kv_len, p.kv_block));
      std::vector<float> peak(cells.size());
      std::vector<float> mass(cells.size());
      all.copy_out(cells, s.first_q_block, p.peak, peak.data());
      if (p.mass != nullptr) all.copy_out(cells, s.first_q_block, p.mass, mass.data());
      own.peak = peak.data();
      own.mass = mass.data();
      if (p.budgets != nullptr) own.budgets = p.budgets + s.idx * p.q_heads;
      if (p.shares != nullptr) own.shares = p.shares + s.idx * p.q_heads;
      cpu::run_select(own);
    });
  }

  static void attention(const AttentionParams& p) {
    overwrite_scratch(p);
    if (p.indices == nullptr) {  // over all blocks: it prepares for itself
      AttentionParams own = p;
      const Workspace workspace(own, cpu::block_sparse_attention_workspace_bytes(own));
      return cpu::run_attention(own);
    }
    for_each_sequence(p, [&](const Sequence& s) {
      AttentionParams own = alone(p, s);
      place_tensors(p, s, &own);
      own.v = from_token(p.v, p.v_strides, s.kv_start, p.dtype);
      own.out = from_token(p.out, p.out_strides, s.q_start, p.dtype);
      own.lse = p.lse + s.q_start;
      own.q_offset = s.offset;
      own.rows = {0, ceil_div(own.q_len, own.q_block)};
      own.list_rows = {p.list_rows.begin - s.first_q_block, p.list_rows.end - s.first_q_block};
      const Workspace workspace(own, cpu::block_sparse_attention_workspace_bytes(own));
      cpu::run_attention(own);
    });
  }

 private:
  // [lists, query blocks, key blocks]
  struct Cells {
    int64_t lists, rows, width;

    Cells(int64_t lists, int64_t rows, int64_t width) : lists(lists), rows(rows), width(width) {}
    std::size_t size() const { return static_cast<std::size_t>(lists * rows * width); }

    void copy_in(const Cells& part, int64_t first_row, const float* from, float* to) const {
      for_each_row(part, first_row, [&](int64_t mine, int64_t theirs) {
        std::copy_n(from + theirs, part.width, to + mine);
      });
    }
    void copy_out(const Cells& part, int64_t first_row, const float* from, float* to) const {
      for_each_row(part, first_row, [&](int64_t mine, int64_t theirs) {
        std::copy_n(from + mine, part.width, to + theirs);
      });
    }

   private:
    template <typename Visit>
    void for_each_row(const Cells& part, int64_t first_row, const Visit& visit) const {
      for (int64_t i = 0; i < part.lists * part.rows; ++i) {
        const int64_t row = i / part.rows * rows + first_row + i % part.rows;
        visit(row * width, i * part.width);
      }
    }
  };
};

}  // namespace proxyattn::test
