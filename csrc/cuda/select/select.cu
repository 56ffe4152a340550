#include "proxyattn/select.h"

#include "common/validate.h"
#include "cuda/common/launch.h"
#include "cuda/common/limits.h"
#include "cuda/select/rows.h"
#include "cuda/select/select_kernel.cuh"
#include "cuda/sequences/packed.h"

namespace proxyattn::cuda {
namespace {

constexpr const char* kOp = "select_blocks";

// Rows with at most `capacity` visible blocks are sorted by one thread block of this shape.
struct SizeClass {
  int64_t capacity;
  int64_t threads;
  void (*launch)(const SelectArgs& args, const RowClass& rows, int64_t num_ctas, Stream stream);
};

template <int kThreads, int kItems, int kParts>
void launch_class(const SelectArgs& args, const RowClass& rows, int64_t num_ctas, Stream stream) {
  LaunchShape shape{num_ctas};
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(typename RowSelector<kThreads, kItems, kParts>::Shared);
  static_assert(sizeof(typename RowSelector<kThreads, kItems, kParts>::Shared) <=
                kPortableSharedBytes);
  if (args.is_packed()) {
    launch<select_packed_kernel<kThreads, kItems, kParts>>(kOp, shape, stream, args, rows);
  } else {
    launch<select_blocks_kernel<kThreads, kItems, kParts>>(kOp, shape, stream, args, rows);
  }
}

template <int kThreads, int kItems, int kParts>
constexpr SizeClass make_class() {
  return {RowSelector<kThreads, kItems, kParts>::kCapacity, kThreads,
          launch_class<kThreads, kItems, kParts>};
}

constexpr SizeClass kSizeClasses[] = {
    make_class<128, 1, 1>(),  make_class<128, 4, 1>(), make_class<256, 4, 1>(),
    make_class<256, 8, 1>(),  make_class<512, 8, 1>(), make_class<512, 16, 1>(),
    make_class<512, 16, 2>(),
};
static_assert(kSizeClasses[6].capacity == kMaxCudaKvBlocks);

// Of the thread blocks that look for packed rows of a class, on a multiprocessor: about what runs
// at once, since sorts take many registers.
constexpr int64_t kPackedThreads = 1024;

SelectArgs make_args(const SelectParams& p) {
  SelectArgs args{};
  args.grid = {p.q_len, p.kv_len, p.q_block, p.kv_block, p.q_offset, p.causal, p.window};
  args.num_sink_blocks = p.num_sink_blocks;
  args.num_local_blocks = p.num_local_blocks;
  args.packed = packed_table(p);
  args.num_lists = is_packed(p) ? p.proxy_heads : p.batch * p.proxy_heads;
  args.scores = {p.rows.begin, p.rows.end - p.rows.begin};
  args.lists = {p.list_rows.begin, p.list_rows.end - p.list_rows.begin};
  args.num_blocks = args.grid.num_kv_blocks();
  args.list_capacity = p.list_capacity;
  args.list_heads = p.q_heads / p.proxy_heads;
  args.min_blocks = ceil_div(min_of(p.min_budget, p.kv_len), p.kv_block);
  args.only_prefixes = p.only_prefixes;
  args.peak = p.peak;
  args.mass = p.mass;
  args.budgets = p.budgets;
  args.indices = p.indices;
  args.counts = p.counts;
  args.shares = p.budget_mode == BudgetMode::kTopP ? p.shares : nullptr;
  args.gamma = p.gamma;
  return args;
}

// Smallest classes come first.
const SizeClass& class_of(int64_t visible) {
  const SizeClass* size = kSizeClasses;
  while (size->capacity < visible) ++size;
  return *size;
}

RowClass row_class(const SizeClass& size, int64_t end) {
  const bool is_first = &size == kSizeClasses;
  const int64_t too_short = is_first ? -1 : (&size - 1)->capacity;
  return {end, static_cast<int>(too_short), static_cast<int>(size.capacity)};
}

// The first of rows [begin, end) behind whose first `blocks` key blocks there are visible ones:
// where those end never falls with m.
int64_t first_row_beyond(const BlockGrid& grid, int64_t begin, int64_t end, int64_t blocks) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (grid.visible(middle) <= blocks) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Launches rows [begin, end), which may be of different lengths, the longest first. Each class is a
// range of them. Not so in a window, where what rows see rises and then goes up and down: there a
// class is offered the rows of larger ones too, and the device picks.
void launch_rows(const SelectArgs& args, int64_t begin, int64_t end, Stream stream) {
  if (begin >= end) return;
  const int64_t most = min_of(args.grid.most_visible(), args.grid.visible(end - 1));
  for (const SizeClass* size = &class_of(most); begin < end; --size) {
    const RowClass rows = row_class(*size, end);
    const int64_t first = first_row_beyond(args.grid, begin, end, rows.too_short);
    size->launch(args, rows, (end - first) * args.num_lists, stream);
    if (size == kSizeClasses) return;
    if (args.grid.window == 0) end = first;
  }
}

// Launches every class that there can be rows of; the device finds out which they are.
void launch_packed(const SelectArgs& args, Stream stream) {
  const int64_t num_units = args.scores.count * args.num_lists;
  const int64_t threads =
      int64_t{device_attribute(kOp, cudaDevAttrMultiProcessorCount)} * kPackedThreads;
  for (const SizeClass& size : kSizeClasses) {
    size.launch(args, row_class(size, 0), min_of(num_units, threads / size.threads), stream);
    if (size.capacity >= args.grid.most_visible()) break;
  }
}

}  // namespace

void select_blocks(const SelectParams& params, Stream stream) {
  validate_select(params);
  validate_prepared(kOp, params.packed);
  validate_alignment(kOp, params);
  const SelectArgs args = make_args(params);
  check_num_kv_blocks(kOp, args.num_blocks);
  if (params.batch == 0) return;
  if (is_packed(params)) {
    launch_packed(args, stream);
  } else {
    launch_rows(args, params.rows.begin, params.rows.end, stream);
  }
}

}  // namespace proxyattn::cuda
