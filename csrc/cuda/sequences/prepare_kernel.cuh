// Packed sequences, device code: from starts, lengths and capacities to the table that every stage
// reads (common/sequence.h).
//
// One thread block, kPrepareThreads sequences at a time with sums and maxima carried on. Starts are
// made rising by a running maximum, and everything is cut to what the tensors and the capacities
// hold, so that nothing in the table leads outside, whatever the lengths say. Sequences are put in
// order by their keys as far as one thread block sorts them at once; more than that stay in the
// order of the call, which is no less right.
#pragma once

#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>

#include "common/math.h"
#include "common/sequence.h"
#include "cuda/common/macros.cuh"

namespace proxyattn::cuda {

inline constexpr int kPrepareThreads = 512;

struct PrepareProblem {
  PackedSequences packed;
  SequenceTable table;
  SequenceLimits limits;
  int max_total_kv;
  int first_block;  // of the query blocks of all sequences: those to work on
  int end_block;
  int q_block;
  int kv_block;
  int unit_tokens;  // of kWindowUnit windows
  int key_bits;     // of max_kv_len
};

struct MaxOf {
  PROXYATTN_DEVICE int operator()(int a, int b) const { return max(a, b); }
};

class SequencePreparer {
  using Scan = cub::BlockScan<int, kPrepareThreads>;
  using LongScan = cub::BlockScan<long long, kPrepareThreads>;  // lengths may be any numbers
  using Sort = cub::BlockRadixSort<int, kPrepareThreads, 1, int>;

 public:
  union Shared {
    typename Scan::TempStorage scan;
    typename LongScan::TempStorage long_scan;
    typename Sort::TempStorage sort;
  };

  PROXYATTN_DEVICE SequencePreparer(const PrepareProblem& problem, Shared& shared)
      : p_(problem), shared_(shared), thread_(static_cast<int>(threadIdx.x)) {}

  PROXYATTN_DEVICE void run() {
    for (int first = 0; first < count(); first += kPrepareThreads) place(first + thread_);
    __syncthreads();  // all sequences are written
    int blocks = 0;
    for (int first = 0; first < count(); first += kPrepareThreads) order(first, blocks);
    if (thread_ == 0) p_.table.blocks_before[count()] = blocks;
    fill(p_.table.block_sequence, p_.table.max_q_blocks,
         min(q_blocks_, p_.end_block) - p_.first_block,
         [](const Sequence& s) { return s.first_q_block; });
    fill(p_.table.unit_sequence, p_.table.max_key_units, key_units_,
         [](const Sequence& s) { return s.first_key_unit; });
  }

 private:
  PROXYATTN_DEVICE int count() const { return p_.table.count; }

  // From the start of sequence i to the next, each no less than those before.
  PROXYATTN_DEVICE TokenSpan rising_starts(const int32_t* starts,
                                           int32_t total,
                                           int i,
                                           int& least) {
    int begin = cut_start(i < count() ? starts[i] : 0, least, total);
    Scan(shared_.scan).InclusiveScan(begin, begin, MaxOf(), least);
    __syncthreads();  // the scan's scratch is free again
    return {begin, i < count() ? cut_start(starts[i + 1], begin, total) : begin};
  }

  template <typename Sum>
  PROXYATTN_DEVICE Sum sum_before(int value, Sum& carried) {
    Sum before;
    Sum total;
    if constexpr (sizeof(Sum) == sizeof(int)) {
      Scan(shared_.scan).ExclusiveSum(value, before, total);
    } else {
      LongScan(shared_.long_scan).ExclusiveSum(Sum{value}, before, total);
    }
    __syncthreads();  // the scan's scratch is free again
    before += carried;
    carried += total;
    return before;
  }

  PROXYATTN_DEVICE void place(int i) {
    const PackedSequences& packed = p_.packed;
    const TokenSpan q = rising_starts(packed.q_starts, p_.limits.total_q, i, q_start_);
    TokenSpan kv{};
    if (packed.kv_starts != nullptr) {
      kv = rising_starts(packed.kv_starts, p_.limits.total_kv, i, kv_start_);
    }
    const bool exists = i < count();
    Sequence s{};
    if (exists) s = cut_sequence(packed, p_.limits, i, q, kv);
    s.first_q_block = sum_before(ceil_div(s.q_len, p_.q_block), q_blocks_);
    // Keys that are more than the capacity of all sequences are nobody's.
    const long long keys_before = sum_before(s.kv_len, keys_);
    const long long keys_left = max_of<long long>(0, p_.max_total_kv - keys_before);
    s.kv_len = static_cast<int>(min_of<long long>(s.kv_len, keys_left));
    s.offset = s.kv_len - s.q_len;
    s = cut_to_blocks(s, p_.first_block, p_.end_block, p_.q_block);
    s.first_kv_block = sum_before(ceil_div(s.kv_len, p_.kv_block), kv_blocks_);
    s.first_key_unit = sum_before(ceil_div(s.kv_len, p_.unit_tokens), key_units_);
    if (exists) p_.table.sequences[i] = s;
  }

  // Places [first, first + kPrepareThreads) of the order, behind `blocks` query blocks.
  PROXYATTN_DEVICE void order(int first, int& blocks) {
    const int place = first + thread_;
    int sequence[1] = {place};
    if (count() <= kPrepareThreads) {
      // Behind all others what is no sequence.
      int keys[1] = {place < count() ? p_.table.sequences[place].kv_len + 1 : 0};
      Sort(shared_.sort).SortDescending(keys, sequence, 0, p_.key_bits + 1);
      __syncthreads();  // the sort's scratch is free again
    }
    const bool exists = place < count();
    const int mine = exists ? ceil_div(p_.table.sequences[sequence[0]].q_len, p_.q_block) : 0;
    const int before = sum_before(mine, blocks);
    if (!exists) return;
    p_.table.order[place] = sequence[0];
    p_.table.blocks_before[place] = before;
  }

  // Whose each of `used` things is: the last sequence's that begins with it or before.
  template <typename First>
  PROXYATTN_DEVICE void fill(int32_t* owners, int size, int used, const First& first_of) const {
    for (int i = thread_; i < size; i += kPrepareThreads) {
      int begin = 0;
      for (int end = count(); i < used && end - begin > 1;) {
        const int middle = (begin + end) / 2;
        (first_of(p_.table.sequences[middle]) <= i ? begin : end) = middle;
      }
      owners[i] = i < used ? begin : count();
    }
  }

  const PrepareProblem& p_;
  Shared& shared_;
  const int thread_;
  int q_start_ = 0;
  int kv_start_ = 0;
  int q_blocks_ = 0;
  long long keys_ = 0;
  int kv_blocks_ = 0;
  int key_units_ = 0;
};

static __global__ void __launch_bounds__(kPrepareThreads)
    prepare_sequences_kernel(const __grid_constant__ PrepareProblem problem) {
  __shared__ SequencePreparer::Shared shared;
  SequencePreparer(problem, shared).run();
}

}  // namespace proxyattn::cuda
