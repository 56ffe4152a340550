// Stage 4, select_blocks, device code.
//
//   peak, mass, indices  [batch * proxy_heads, rows, blocks]
//   counts               [batch, q_heads, rows]
//
// A thread block owns one list: one proxy head of one batch entry, one query block. The forced
// blocks take the first places by formula, and what is left of the visible blocks is the range
// [num_sinks, local_begin), which a radix sort in shared memory puts in order of falling peak. The
// sort is stable and is given the blocks from the latest down, so of equal peaks the later block
// comes first. Each thread holds kItems keys; rows are launched in classes by their length.
//
// Coverage then needs sums of the mass over prefixes of the ranking. Each thread adds the masses
// of a run of neighbouring places in double, a block scan adds up the runs, and one thread per
// head finds its run by bisection and walks it. The order of the additions depends on the number
// of visible blocks only.
//
// Assumes at most kMaxCudaKvBlocks blocks, so that a place fits 16 bits.
#pragma once

#include <cstdint>
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_scan.cuh>
#include <new>

#include "common/block_grid.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda {

// Shares this far below the target count as reached, so that rounding costs no block.
inline constexpr double kShareSlack = 1e-6;
// The share of heads that take every block: no prefix reaches it.
inline constexpr double kTakeAll = __builtin_huge_val();

struct SelectArgs {
  BlockGrid grid;
  int64_t num_sink_blocks;
  int64_t num_local_blocks;
  int64_t num_lists;   // batch * proxy_heads
  int64_t first_row;   // query block of row 0 of the tensors
  int64_t num_rows;    // rows of the tensors
  int64_t num_blocks;  // key blocks
  int64_t list_heads;  // query heads that read one list
  int64_t min_blocks;
  bool complete_lists_unordered;
  const float* peak;
  const float* mass;  // null unless coverage
  const int32_t* budgets;
  int32_t* indices;
  int32_t* counts;
  double* shares;  // null unless coverage
};

// The rows that one launch works on, last one first.
struct RowClass {
  int64_t end;
  bool sets_shares;  // this is the last query block: its shares go to `shares`
};

// Unsigned keys whose rising order is that of falling peaks. NaN counts as +inf, -0 as +0.
PROXYATTN_DEVICE uint32_t falling_key(float peak) {
  if (isnan(peak)) peak = __int_as_float(0x7f800000);
  const uint32_t bits = peak == 0.0f ? 0u : __float_as_uint(peak);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

// What a thread block must know of its row. Kept in shared memory, because the sort needs every
// register.
struct Row {
  int64_t list;
  int64_t idx;  // in the tensors
  const float* peak;
  const float* mass;
  int32_t* ranking;
  ForcedBlocks forced;
  int visible;

  PROXYATTN_DEVICE Row(const SelectArgs& args, int64_t list_idx, int64_t m)
      : list(list_idx),
        idx(m - args.first_row),
        forced(args.grid, m, args.num_sink_blocks, args.num_local_blocks) {
    const int64_t offset = (list * args.num_rows + idx) * args.num_blocks;
    peak = args.peak + offset;
    mass = args.mass == nullptr ? nullptr : args.mass + offset;
    ranking = args.indices + offset;
    visible = static_cast<int>(forced.visible);
  }
};

// Number of the `count` rising keys that are below `key`, or at most `key` when kOrEqual.
template <bool kOrEqual>
PROXYATTN_DEVICE int count_below(const uint32_t* keys, int count, uint32_t key) {
  int below = 0;
  for (int step = 1 << (31 - __clz(count | 1)); step > 0; step /= 2) {
    const int next = below + step;
    if (next <= count && (kOrEqual ? keys[next - 1] <= key : keys[next - 1] < key)) below = next;
  }
  return below;
}

// kParts is 2 for rows that need more registers than a thread block has: the halves are sorted one
// after the other and each finds its places among the other's by bisection.
template <int kThreads, int kItems, int kParts>
struct RowSelector {
  static_assert(kParts == 1 || kParts == 2);
  static constexpr int kPartSize = kThreads * kItems;
  static constexpr int kCapacity = kPartSize * kParts;
  static constexpr uint32_t kPadding = 0xffffffffu;  // behind every peak
  static constexpr int kRadixBits = 5;               // of a pass
  using Sort = cub::BlockRadixSort<uint32_t, kThreads, kItems, uint16_t, kRadixBits>;
  using Scan = cub::BlockScan<double, kThreads>;

  struct PrefixSums {
    typename Scan::TempStorage scan;
    double before[kThreads];  // mass of the places before each thread's run
  };
  struct FirstPart {
    uint32_t keys[kParts == 1 ? 1 : kPartSize];
    uint16_t places[kParts == 1 ? 1 : kPartSize];
  };
  struct Shared {
    union {
      typename Sort::TempStorage sort;
      uint32_t second_keys[kParts == 1 ? 1 : kPartSize];
      PrefixSums sums;
    };
    FirstPart first;
    uint32_t set_in_any;  // bits of the keys
    uint32_t set_in_all;
  };

  const SelectArgs& args;
  Shared& shared;
  const Row& row;

  // Places count the free blocks from the latest down, before the sort.
  PROXYATTN_DEVICE int block_at_place(int place) const {
    return static_cast<int>(row.forced.local_begin) - 1 - place;
  }

  // Loads and sorts one part. Thread t then holds elements t, t + kThreads, ... of the result.
  PROXYATTN_DEVICE void sort_part(int first_place,
                                  int num_free,
                                  uint32_t (&keys)[kItems],
                                  uint16_t (&places)[kItems]) const {
    uint32_t in_any = 0;
    uint32_t in_all = ~0u;
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int place = first_place + static_cast<int>(threadIdx.x) * kItems + i;
      places[i] = static_cast<uint16_t>(place);
      keys[i] = kPadding;
      if (place >= num_free) continue;
      keys[i] = falling_key(row.peak[block_at_place(place)]);
      in_any |= keys[i];
      in_all &= keys[i];
    }
    Sort(shared.sort).SortBlockedToStriped(keys, places, 0, unlike_bits(in_any, in_all));
  }

  // How many bits from the lowest a sort must look at: above those all keys are alike. Peaks of a
  // row mostly share sign and exponent, which saves a pass or two. Padding comes last in any case:
  // it is all ones, and behind all keys from the start.
  PROXYATTN_DEVICE int unlike_bits(uint32_t in_any, uint32_t in_all) const {
    if (threadIdx.x == 0) {
      shared.set_in_any = 0;
      shared.set_in_all = ~0u;
    }
    __syncthreads();  // orders the start values before what warps add
    in_any = __reduce_or_sync(kAllLanes, in_any);
    in_all = __reduce_and_sync(kAllLanes, in_all);
    if (leads_warp()) {
      atomicOr(&shared.set_in_any, in_any);
      atomicAnd(&shared.set_in_all, in_all);
    }
    __syncthreads();  // what warps added is there
    return max(1, 32 - __clz(static_cast<int>(shared.set_in_any ^ shared.set_in_all)));
  }

  // `ranking` is where the free blocks start.
  PROXYATTN_DEVICE void rank_one_part(int32_t* ranking, int num_free) const {
    uint32_t keys[kItems];
    uint16_t places[kItems];
    sort_part(0, num_free, keys, places);
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int rank = i * kThreads + static_cast<int>(threadIdx.x);
      if (rank < num_free) ranking[rank] = block_at_place(places[i]);
    }
  }

  PROXYATTN_DEVICE void rank_two_parts(int32_t* ranking, int num_free) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int num_first = min(num_free, kPartSize);
    const int num_second = num_free - num_first;
    uint32_t keys[kItems];
    uint16_t places[kItems];
    sort_part(0, num_free, keys, places);
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      shared.first.keys[i * kThreads + thread] = keys[i];
      shared.first.places[i * kThreads + thread] = places[i];
    }
    __syncthreads();  // shared.first is written, and the sort's scratch is free again
    sort_part(kPartSize, num_free, keys, places);
    __syncthreads();  // the sort's scratch is read
    // Of equal keys those of the first part come first: they are later blocks.
    PROXYATTN_UNROLL
    for (int i = 0; i < kItems; ++i) {
      const int rank = i * kThreads + thread;
      if (rank < num_second) {
        const int before = count_below<true>(shared.first.keys, num_first, keys[i]);
        ranking[rank + before] = block_at_place(places[i]);
      }
      shared.second_keys[rank] = keys[i];
    }
    __syncthreads();  // shared.second_keys is written
    for (int rank = thread; rank < num_first; rank += kThreads) {
      const int before =
          count_below<false>(shared.second_keys, num_second, shared.first.keys[rank]);
      ranking[rank + before] = block_at_place(shared.first.places[rank]);
    }
  }

  PROXYATTN_DEVICE void rank() const {
    const int thread = static_cast<int>(threadIdx.x);
    const int num_forced = static_cast<int>(row.forced.count());
    for (int i = thread; i < num_forced; i += kThreads) {
      row.ranking[i] = static_cast<int32_t>(row.forced.block_at(i));
    }
    for (int64_t i = row.visible + thread; i < args.num_blocks; i += kThreads) row.ranking[i] = -1;

    const int num_free = row.visible - num_forced;
    if (num_free == 0) return;
    if constexpr (kParts == 1) {
      rank_one_part(row.ranking + num_forced, num_free);
    } else {
      rank_two_parts(row.ranking + num_forced, num_free);
    }
  }

  // Whether all heads of the list read every visible block.
  PROXYATTN_DEVICE bool is_complete() const {
    const int64_t least = max_of<int64_t>(args.min_blocks, row.forced.count());
    bool complete = true;
    for (int64_t i = threadIdx.x; i < args.list_heads; i += kThreads) {
      complete &=
          max_of<int64_t>(args.budgets[row.list * args.list_heads + i], least) >= row.visible;
    }
    return __syncthreads_and(complete);
  }

  // All visible blocks from the last down, as dense attention reads them.
  PROXYATTN_DEVICE void list_all() const {
    for (int64_t i = threadIdx.x; i < args.num_blocks; i += kThreads) {
      row.ranking[i] = i < row.visible ? row.visible - 1 - static_cast<int>(i) : -1;
    }
  }

  // Places that each thread adds up.
  PROXYATTN_DEVICE int run_length() const { return (row.visible + kThreads - 1) / kThreads; }

  // Fills shared.sums.before and returns the mass of all visible blocks.
  PROXYATTN_DEVICE double sum_runs() const {
    __syncthreads();  // the ranking is written, and the sort's memory is read
    const int thread = static_cast<int>(threadIdx.x);
    const int begin = min(thread * run_length(), row.visible);
    const int end = min(begin + run_length(), row.visible);
    double sum = 0.0;
    for (int i = begin; i < end; ++i) sum += static_cast<double>(row.mass[row.ranking[i]]);
    double before;
    double total;
    Scan(shared.sums.scan).ExclusiveSum(sum, before, total);
    shared.sums.before[thread] = before;
    __syncthreads();  // shared.sums.before is written
    return total;
  }

  PROXYATTN_DEVICE double share_of(int64_t budget, double total) const {
    budget = max_of<int64_t>(budget, 0);
    if (budget >= row.visible) return kTakeAll;
    const int end = static_cast<int>(budget);
    const int run = end / run_length();
    double sum = shared.sums.before[run];
    for (int i = run * run_length(); i < end; ++i) {
      sum += static_cast<double>(row.mass[row.ranking[i]]);
    }
    return sum / total;
  }

  // Length of the shortest prefix of the ranking that holds the share; all visible blocks when
  // none does, as when a NaN is among the masses.
  PROXYATTN_DEVICE int blocks_to_cover(double share, double total) const {
    const double target = (share - kShareSlack) * total;
    if (!(total > 0.0) || !(target < kTakeAll)) return row.visible;
    if (target <= 0.0) return 0;
    int run = 0;  // the last one with less than the target before it
    for (int step = kThreads / 2; step > 0; step /= 2) {
      if (shared.sums.before[run + step] < target) run += step;
    }
    const int end = min((run + 1) * run_length(), row.visible);
    double sum = shared.sums.before[run];
    int i = run * run_length();
    while (i < end && sum < target) sum += static_cast<double>(row.mass[row.ranking[i++]]);
    return i;
  }

  PROXYATTN_DEVICE void store_count(int64_t head, int64_t blocks) const {
    const int64_t least = max_of<int64_t>(1, row.forced.count());
    blocks = max_of(max_of(blocks, args.min_blocks), least);
    args.counts[head * args.num_rows + row.idx] =
        static_cast<int32_t>(min_of<int64_t>(blocks, row.visible));
  }

  PROXYATTN_DEVICE void count(bool sets_shares) const {
    const bool coverage = args.shares != nullptr;
    const double total = coverage ? sum_runs() : 0.0;
    // Heads are numbered over the batch, as lists are.
    const int64_t end = (row.list + 1) * args.list_heads;
    for (int64_t head = row.list * args.list_heads + threadIdx.x; head < end; head += kThreads) {
      int64_t blocks = args.budgets[head];
      if (coverage) {
        if (sets_shares) args.shares[head] = share_of(blocks, total);
        blocks = blocks_to_cover(args.shares[head], total);
      }
      store_count(head, blocks);
    }
  }
};

template <int kThreads, int kItems, int kParts>
__global__ void __launch_bounds__(kThreads, 1)
    select_blocks_kernel(const __grid_constant__ SelectArgs args, const RowClass rows) {
  using Selector = RowSelector<kThreads, kItems, kParts>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ __align__(16) unsigned char row_bytes[sizeof(Row)];
  if (threadIdx.x == 0) {
    const int64_t list = blockIdx.x % args.num_lists;
    new (row_bytes) Row(args, list, rows.end - 1 - blockIdx.x / args.num_lists);
  }
  __syncthreads();  // orders the row's facts before their readers
  const Selector selector{args, *reinterpret_cast<typename Selector::Shared*>(shared_bytes),
                          *reinterpret_cast<const Row*>(row_bytes)};
  if (args.complete_lists_unordered && selector.is_complete()) {
    selector.list_all();
  } else {
    selector.rank();
  }
  selector.count(rows.sets_shares);
}

}  // namespace proxyattn::cuda
