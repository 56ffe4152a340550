// Stage 4, select_blocks, device code.
//
//   peak, mass  [batch * proxy_heads, rows, blocks]
//   indices     [batch * proxy_heads, list rows, blocks]
//   counts      [batch, q_heads, list rows]
//
// Packed sequences are one batch entry whose rows are the query blocks of all of them; budgets and
// shares have a row for each sequence.
//
// A thread block works on one list: one proxy head of one batch entry, one query block. The forced
// blocks take the first places by formula, and what is left of the visible blocks is a range that
// ends with local_begin, which a radix sort in shared memory puts in order of falling peak. The
// sort is stable and is given the blocks from the latest down, so of equal peaks the later block
// comes first. Each thread holds kItems keys; rows are launched in classes by their length. Of
// packed rows only the device knows which class they are of: the thread blocks of every class look
// through all of them (rows.h). In a batch a window leaves it to them, too.
//
// Where only the first places need be in order, the key of the last of them is found bit by bit,
// and what is not behind it sorted by itself.
//
// Top-p then needs sums of the mass over prefixes of the ranking. Each thread adds the masses of a
// run of neighbouring places in double, a block scan adds up the runs, and one thread per head
// finds its run by bisection and walks it. The order of the additions depends on the number of
// visible blocks only.
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
#include "cuda/select/rows.h"

namespace proxyattn::cuda {

// Of the mass outside the forced blocks, what may be missing at a need: rounding costs no block.
inline constexpr double kNeedSlack = 1e-6;

// Unsigned keys whose rising order is that of falling peaks. NaN counts as +inf, -0 as +0.
PROXYATTN_DEVICE uint32_t falling_key(float peak) {
  if (isnan(peak)) peak = __int_as_float(0x7f800000);
  const uint32_t bits = peak == 0.0f ? 0u : __float_as_uint(peak);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

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

  static constexpr int kAllItems = kItems * kParts;
  // As many first places are sorted by themselves.
  static constexpr int kTopItems = max_of(1, kAllItems / 8);
  static constexpr int kTopSize = kThreads * kTopItems;
  using TopSort = cub::BlockRadixSort<uint32_t, kThreads, kTopItems, uint16_t, kRadixBits>;
  using TopScan = cub::BlockScan<uint32_t, kThreads>;

  struct PrefixSums {
    typename Scan::TempStorage scan;
    double before[kThreads];  // mass of the places before each thread's run
  };
  struct FirstPart {
    uint32_t keys[kParts == 1 ? 1 : kPartSize];
    uint16_t places[kParts == 1 ? 1 : kPartSize];
  };
  struct Top {
    uint32_t keys[kTopSize];
    uint16_t places[kTopSize];
  };
  struct Shared {
    union {
      typename Sort::TempStorage sort;
      typename TopSort::TempStorage top_sort;
      typename TopScan::TempStorage top_scan;
      uint32_t second_keys[kParts == 1 ? 1 : kPartSize];
      PrefixSums sums;
    };
    union {
      FirstPart first;
      Top top;
    };
    uint32_t set_in_any;  // bits of the keys
    uint32_t set_in_all;
    int smaller[32];  // keys below the threshold that each bit was tried with
    int longest;      // prefix that must be in order
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

  // Blocks that a head reads; at least one.
  PROXYATTN_DEVICE int64_t clamp_count(int64_t blocks) const {
    const int64_t least = max_of(1, row.num_forced);
    return min_of<int64_t>(max_of(max_of(blocks, args.min_blocks), least), row.visible);
  }

  // First places that must be in order.
  PROXYATTN_DEVICE int ordered_places() const {
    // Top-p finds where prefixes end in the ranking itself.
    if (!args.only_prefixes || args.shares != nullptr) return row.visible;
    if (threadIdx.x == 0) shared.longest = 0;
    __syncthreads();  // orders the start value before what threads find
    for (int64_t i = threadIdx.x; i < args.list_heads; i += kThreads) {
      const int64_t count = clamp_count(args.budgets[row.first_need + i]);
      if (count < row.visible) atomicMax(&shared.longest, static_cast<int>(count));
    }
    __syncthreads();  // all have been found
    return shared.longest;
  }

  // Adds up over the thread block; each counter serves once.
  PROXYATTN_DEVICE int add_up(int* counter, int count) const {
    count = __reduce_add_sync(kAllLanes, count);
    if (leads_warp()) atomicAdd(counter, count);
    __syncthreads();  // all warps have added
    return *counter;
  }

  // The key that `wanted` - 1 keys or fewer are below and `wanted` or more not above. Sets `below`.
  PROXYATTN_DEVICE uint32_t find_last_key(const uint32_t (&keys)[kAllItems],
                                          int wanted,
                                          int num_bits,
                                          uint32_t common,
                                          int& below) const {
    uint32_t last = num_bits == 32 ? 0u : common >> num_bits << num_bits;
    below = 0;
    PROXYATTN_NO_UNROLL
    for (int bit = num_bits - 1; bit >= 0; --bit) {
      const uint32_t tried = last | 1u << bit;
      int smaller = 0;
      PROXYATTN_UNROLL
      for (int i = 0; i < kAllItems; ++i) smaller += keys[i] < tried;
      smaller = add_up(&shared.smaller[bit], smaller);
      if (smaller < wanted) {
        last = tried;
        below = smaller;
      }
    }
    return last;
  }

  // Puts the first `wanted` free blocks in order and the others behind them, as they stand.
  PROXYATTN_DEVICE void rank_top(int32_t* ranking, int num_free, int wanted) const {
    const int thread = static_cast<int>(threadIdx.x);
    const int first_place = thread * kAllItems;
    uint32_t keys[kAllItems];
    uint32_t in_any = 0;
    uint32_t in_all = ~0u;
    PROXYATTN_UNROLL
    for (int i = 0; i < kAllItems; ++i) {
      keys[i] = kPadding;
      if (first_place + i >= num_free) continue;
      keys[i] = falling_key(row.peak[block_at_place(first_place + i)]);
      in_any |= keys[i];
      in_all &= keys[i];
    }
    if (thread < 32) shared.smaller[thread] = 0;  // ordered by the barriers of unlike_bits
    const int num_bits = unlike_bits(in_any, in_all);
    int below;
    const uint32_t last = find_last_key(keys, wanted, num_bits, shared.set_in_all, below);

    // Of keys like the last one those of the first places are taken. Two counts in one word.
    constexpr int kHalf = 16;
    const uint32_t kLow = (1u << kHalf) - 1;
    uint32_t mine = 0;
    PROXYATTN_UNROLL
    for (int i = 0; i < kAllItems; ++i) {
      mine +=
          static_cast<uint32_t>(keys[i] < last) + (static_cast<uint32_t>(keys[i] == last) << kHalf);
    }
    uint32_t before;
    TopScan(shared.top_scan).ExclusiveSum(mine, before);
    int smaller = static_cast<int>(before & kLow);
    int alike = static_cast<int>(before >> kHalf);
    const int wanted_alike = wanted - below;
    PROXYATTN_UNROLL
    for (int i = 0; i < kAllItems; ++i) {
      const int place = first_place + i;
      const int taken = smaller + min(alike, wanted_alike);
      if (keys[i] < last || (keys[i] == last && alike < wanted_alike)) {
        shared.top.keys[taken] = keys[i];
        shared.top.places[taken] = static_cast<uint16_t>(place);
      } else if (place < num_free) {
        ranking[wanted + place - taken] = block_at_place(place);
      }
      smaller += keys[i] < last;
      alike += keys[i] == last;
    }
    __syncthreads();  // shared.top is written, and the scan's scratch is free
    sort_top(ranking, wanted, num_bits);
  }

  PROXYATTN_DEVICE void sort_top(int32_t* ranking, int wanted, int num_bits) const {
    uint32_t keys[kTopItems];
    uint16_t places[kTopItems];
    PROXYATTN_UNROLL
    for (int i = 0; i < kTopItems; ++i) {
      const int idx = static_cast<int>(threadIdx.x) * kTopItems + i;
      keys[i] = idx < wanted ? shared.top.keys[idx] : kPadding;
      places[i] = idx < wanted ? shared.top.places[idx] : 0;
    }
    TopSort(shared.top_sort).SortBlockedToStriped(keys, places, 0, num_bits);
    PROXYATTN_UNROLL
    for (int i = 0; i < kTopItems; ++i) {
      const int rank = i * kThreads + static_cast<int>(threadIdx.x);
      if (rank < wanted) ranking[rank] = block_at_place(places[i]);
    }
  }

  PROXYATTN_DEVICE void rank() const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < row.num_forced; i += kThreads) {
      row.ranking[i] = static_cast<int32_t>(row.forced.block_at(i));
    }
    for (int i = row.visible + thread; i < row.list_end; i += kThreads) row.ranking[i] = -1;

    int32_t* ranking = row.ranking + row.num_forced;
    const int num_free = row.visible - row.num_forced;
    const int wanted = ordered_places() - row.num_forced;  // of the free blocks
    if (wanted <= 0) {
      for (int i = thread; i < num_free; i += kThreads) ranking[i] = block_at_place(i);
    } else if constexpr (kParts == 2) {
      rank_two_parts(ranking, num_free);
    } else if (wanted <= kTopSize && wanted < num_free / 2) {
      rank_top(ranking, num_free, wanted);
    } else {
      rank_one_part(ranking, num_free);
    }
  }

  // Places that each thread adds up.
  PROXYATTN_DEVICE int run_length() const { return (row.visible + kThreads - 1) / kThreads; }

  // Masses of the blocks at a few places of the ranking from `first` on: none of a forced block,
  // nor behind `end`. A NaN is one anywhere. Loads go together: each takes as long as all.
  static constexpr int kLoads = 8;
  PROXYATTN_DEVICE void load_masses(int first, int end, float (&masses)[kLoads]) const {
    int blocks[kLoads];
    PROXYATTN_UNROLL
    for (int i = 0; i < kLoads; ++i) blocks[i] = first + i < end ? row.ranking[first + i] : -1;
    PROXYATTN_UNROLL
    for (int i = 0; i < kLoads; ++i) masses[i] = blocks[i] < 0 ? 0.0f : row.mass[blocks[i]];
    PROXYATTN_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      if (first + i < row.num_forced && !isnan(masses[i])) masses[i] = 0.0f;
    }
  }

  // Fills shared.sums.before and returns the mass of all free blocks.
  PROXYATTN_DEVICE double sum_runs() const {
    __syncthreads();  // the ranking is written, and the sort's memory is read
    const int thread = static_cast<int>(threadIdx.x);
    const int begin = min(thread * run_length(), row.visible);
    const int end = min(begin + run_length(), row.visible);
    double sum = 0.0;
    for (int first = begin; first < end; first += kLoads) {
      float masses[kLoads];
      load_masses(first, end, masses);
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) sum += static_cast<double>(masses[i]);
    }
    double before;
    double total;
    Scan(shared.sums.scan).ExclusiveSum(sum, before, total);
    shared.sums.before[thread] = before;
    __syncthreads();  // shared.sums.before is written
    return total;
  }

  // Length of the shortest prefix of the ranking that holds what a head needs.
  PROXYATTN_DEVICE int blocks_to_hold(float share, double total) const {
    if (args.gamma >= 1.0 || isnan(share) || isnan(total)) return row.visible;
    if (share >= 1.0f) return 0;
    const double forced = static_cast<double>(share);
    const double need = (args.gamma - forced) / (1.0 - forced);
    if (isnan(need)) return row.visible;
    const double target = (need - kNeedSlack) * total;
    if (!(target > 0.0)) return 0;
    int run = 0;  // the last one with less than the target before it
    for (int step = kThreads / 2; step > 0; step /= 2) {
      if (shared.sums.before[run + step] < target) run += step;
    }
    const int end = min((run + 1) * run_length(), row.visible);
    double sum = shared.sums.before[run];
    for (int first = run * run_length(); first < end; first += kLoads) {
      float masses[kLoads];
      load_masses(first, end, masses);
      PROXYATTN_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        if (sum >= target) return first + i;
        sum += static_cast<double>(masses[i]);
      }
    }
    return end;
  }

  PROXYATTN_DEVICE void count() const {
    const double total = args.shares == nullptr ? 0.0 : sum_runs();
    for (int64_t i = threadIdx.x; i < args.list_heads; i += kThreads) {
      const int64_t need = row.first_need + i;
      const int64_t blocks =
          args.shares == nullptr ? args.budgets[need] : blocks_to_hold(args.shares[need], total);
      row.counts[i * args.lists.count] = static_cast<int32_t>(clamp_count(blocks));
    }
  }
};

// Of 256 threads three thread blocks share a multiprocessor's registers without spilling: 10 % over
// the two that the compiler leaves room for (2048 blocks in a row). Larger sorts would spill.
constexpr int batch_ctas(int threads) {
  return threads == 256 ? 3 : 1;
}

template <int kThreads, int kItems, int kParts>
__global__ void __launch_bounds__(kThreads, batch_ctas(kThreads))
    select_blocks_kernel(const __grid_constant__ SelectArgs args,
                         const __grid_constant__ RowClass rows) {
  using Selector = RowSelector<kThreads, kItems, kParts>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ __align__(16) unsigned char row_bytes[sizeof(Row)];
  if (threadIdx.x == 0) {
    const RowClass::Unit unit = rows.unit(args, blockIdx.x);
    new (row_bytes) Row(args, unit.list, unit.block);
  }
  __syncthreads();  // orders the row's facts before their readers
  const Row& row = *reinterpret_cast<const Row*>(row_bytes);
  if (!rows.takes(row.visible)) return;
  const Selector selector{args, *reinterpret_cast<typename Selector::Shared*>(shared_bytes), row};
  selector.rank();
  selector.count();
}

// The first unit from `first` on, `step` at a time, whose row is of the class; by a whole warp.
PROXYATTN_DEVICE int64_t find_unit(const SelectArgs& args,
                                   const RowClass& rows,
                                   int64_t first,
                                   int64_t step) {
  while (true) {
    const RowClass::Match match =
        rows.match(args, rows.unit(args, first + warp_lane() * step).block);
    const unsigned found = __ballot_sync(kAllLanes, match == RowClass::Match::kYes);
    if (found != 0) return first + (__ffs(static_cast<int>(found)) - 1) * step;
    if (__any_sync(kAllLanes, match == RowClass::Match::kNoneLeft)) return RowClass::kNoUnit;
    first += kWarpLanes * step;
  }
}

// Thread blocks of a multiprocessor, which its registers are shared out to: a compiler that may
// keep addresses from row to row would take too many, and one that gets too few would spill.
constexpr int packed_ctas(int threads, int items) {
  return (items <= 4 ? 1024 : 512) / threads;
}

// Works on one row after another: a kernel of its own, since a loop costs registers.
template <int kThreads, int kItems, int kParts>
__global__ void __launch_bounds__(kThreads, packed_ctas(kThreads, kItems))
    select_packed_kernel(const __grid_constant__ SelectArgs args,
                         const __grid_constant__ RowClass rows) {
  using Selector = RowSelector<kThreads, kItems, kParts>;
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  __shared__ __align__(16) unsigned char row_bytes[sizeof(Row)];
  __shared__ int64_t current;  // unit
  const Selector selector{args, *reinterpret_cast<typename Selector::Shared*>(shared_bytes),
                          *reinterpret_cast<const Row*>(row_bytes)};
  if (threadIdx.x == 0) current = blockIdx.x - int64_t{gridDim.x};
  PROXYATTN_NO_UNROLL
  while (true) {
    __syncthreads();  // the row before is done with
    if (threadIdx.x < kWarpLanes) {
      const int64_t found = find_unit(args, rows, current + gridDim.x, gridDim.x);
      if (leads_warp()) {
        current = found;
        const RowClass::Unit unit = rows.unit(args, found);
        if (found != RowClass::kNoUnit) new (row_bytes) Row(args, unit.list, unit.block);
      }
    }
    __syncthreads();  // orders the row's facts before their readers
    if (current == RowClass::kNoUnit) return;
    selector.rank();
    selector.count();
  }
}

}  // namespace proxyattn::cuda
