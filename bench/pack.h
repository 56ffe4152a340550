// What a case works on: a batch, or sequences packed one behind another, their keys perhaps in
// pages.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/sequence.h"
#include "harness.h"
#include "problem.h"

namespace proxyattn::bench {

// Axes:
// - seqs: "batch"; a number of sequences of `length` tokens; or "mix", what a server may have at a
//   time: kMixSequences of them, from length / 64 to `length` tokens, about log-uniform, together
//   4 * length;
// - page: tokens of a page of keys, in any order of pages; 0: keys follow one another;
// - calls: "one" for all sequences together, or "each" for a dense call after another.
inline constexpr int64_t kMixSequences = 32;
std::vector<Axis> pack_axes();
std::vector<int64_t> mix_lengths(int64_t longest);

class Pack {
 public:
  Pack(Machine& machine, const Case& one);

  bool is_packed() const { return q_starts_ != nullptr; }
  bool one_by_one() const { return one_by_one_; }
  // Sequences, or one batch.
  int64_t count() const { return static_cast<int64_t>(parts_.size()); }
  Problem problem(int64_t i) const { return parts_[static_cast<std::size_t>(i)].problem; }
  const Problem& longest() const { return longest_; }
  // Which of them are looked at: the first, the last and the longest.
  std::vector<int64_t> sample() const;

  // Query blocks of a list, all sequences together, and where those of one begin.
  int64_t num_rows() const { return num_rows_; }
  int64_t first_row(int64_t i) const { return parts_[static_cast<std::size_t>(i)].first_row; }

  // Makes params for the longest, of attention or of the chain, those for all in one call.
  template <typename Params>
  void place(Params& p) const {
    p.q = q_->data();
    p.k = k_->data();
    p.v = v_->data();
    p.out = out_->data();
    p.list_rows = {0, num_rows_};
    if (!is_packed()) return;
    p.batch = count();
    p.lse_pitch = packed_.total_q;
    p.packed = packed_;
    if (packed_.page_table == nullptr) return;
    p.k = k_pages_->data();
    p.v = v_pages_->data();
    p.k_strides.batch = p.v_strides.batch = packed_.page_len * p.k_strides.token;
  }

  // The dense call of one sequence, for what place() made; of a batch, all of it. Its lists are a
  // part of those of all.
  template <typename Params>
  Params alone(Params p, int64_t i) const {
    if (!is_packed()) return p;
    const Part& part = parts_[static_cast<std::size_t>(i)];
    p.packed = {};
    p.batch = 1;
    p.q_len = p.kv_len = p.lse_pitch = part.problem.length;
    p.list_rows = {-part.first_row, num_rows_ - part.first_row};
    p.q = from_token(p.q, p.q_strides, part.first_token, p.dtype);
    p.k = from_token(static_cast<const void*>(k_->data()), p.k_strides, part.first_token, p.dtype);
    p.v = from_token(static_cast<const void*>(v_->data()), p.v_strides, part.first_token, p.dtype);
    p.out = from_token(p.out, p.out_strides, part.first_token, p.dtype);
    return p;
  }

 private:
  struct Part {
    Problem problem;
    int64_t first_token;
    int64_t first_row;
  };

  void pack(Machine& machine, const std::vector<int64_t>& lengths, int64_t page_len);
  void put_in_pages(Machine& machine, int64_t page_len);

  Problem longest_;
  std::vector<Part> parts_;
  int64_t num_rows_;
  bool one_by_one_ = false;
  PackedSequences packed_;
  std::shared_ptr<Buffer> q_, k_, v_, out_;
  std::shared_ptr<Buffer> q_starts_, kv_starts_, kv_lens_, page_table_, k_pages_, v_pages_;
};

}  // namespace proxyattn::bench
