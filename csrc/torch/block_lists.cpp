// The lists of block_sparse_attention, entry by entry: for debugging, since a GPU's are waited for.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "checks.h"
#include "common/math.h"
#include "ops.h"

namespace proxyattn::binding {
namespace {

constexpr const char* kOp = "block_sparse_attention";

// Of one list and the heads that share it, on the host: indices [rows, capacity] and counts
// [heads, rows].
void check_list(const at::Tensor& indices, const at::Tensor& counts, int64_t num_blocks) {
  const int64_t num_rows = indices.size(0);
  const int64_t capacity = indices.size(1);
  const int32_t* entries = indices.const_data_ptr<int32_t>();
  const int32_t* row_counts = counts.const_data_ptr<int32_t>();
  std::vector<int64_t> named_by(static_cast<std::size_t>(num_blocks), -1);  // the last row
  for (int64_t row = 0; row < num_rows; ++row, entries += capacity) {
    int64_t longest = 0;
    for (int64_t head = 0; head < counts.size(0); ++head) {
      const int64_t count = row_counts[head * num_rows + row];
      TORCH_CHECK_VALUE(0 <= count && count <= capacity, kOp, ": counts must be in [0, ", capacity,
                        "], the lists' capacity, got ", count);
      longest = max_of(longest, count);
    }
    for (int64_t i = 0; i < longest; ++i) {
      const int64_t block = entries[i];
      TORCH_CHECK_VALUE(0 <= block && block < num_blocks, kOp,
                        ": indices must name key blocks in [0, ", num_blocks, "), got ", block);
      int64_t& named = named_by[static_cast<std::size_t>(block)];
      TORCH_CHECK_VALUE(named != row, kOp, ": indices must be unique in each list, got ", block,
                        " twice");
      named = row;
    }
  }
}

}  // namespace

bool wants_lists_checked() {
  const char* text = std::getenv("PROXYATTN_CHECK");
  const std::string_view setting = text == nullptr ? "" : text;
  return !setting.empty() && setting != "0";
}

void check_block_lists(const at::Tensor& indices,
                       const at::Tensor& counts,
                       int64_t kv_len,
                       int64_t block_size) {
  check_rank(kOp, "indices", indices, 4);
  check_dtype(kOp, "indices", indices, at::kInt);
  check_rank(kOp, "counts", counts, 3);
  check_dtype(kOp, "counts", counts, at::kInt);
  const int64_t list_heads = indices.size(1);
  const int64_t q_heads = counts.size(1);
  TORCH_CHECK_VALUE(list_heads >= 1 && q_heads % list_heads == 0, kOp,
                    ": indices must hold lists for a number of heads that divides q_heads, got "
                    "indices.size(1)=",
                    list_heads, ", q_heads=", q_heads);
  TORCH_CHECK_VALUE(kv_len >= 0, kOp, ": kv_len must be at least 0, got kv_len=", kv_len);
  TORCH_CHECK_VALUE(block_size >= 1, kOp,
                    ": block_size must be at least 1, got block_size=", block_size);
  check_shape(kOp, "counts", counts, {indices.size(0), q_heads, indices.size(2)});
  const int64_t heads_per_list = q_heads / list_heads;
  for (int64_t batch = 0; batch < indices.size(0); ++batch) {
    for (int64_t list = 0; list < list_heads; ++list) {
      check_list(indices.select(0, batch).select(0, list).cpu().contiguous(),
                 counts.select(0, batch)
                     .narrow(0, list * heads_per_list, heads_per_list)
                     .cpu()
                     .contiguous(),
                 ceil_div(kv_len, block_size));
    }
  }
}

}  // namespace proxyattn::binding
