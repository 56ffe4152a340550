// The lists of block_sparse_attention, entry by entry.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "checks.h"
#include "common/math.h"
#include "device_checks.h"
#include "ops.h"

namespace proxyattn::binding {
namespace {

// Of one list and the heads that share it, on the host: indices [rows, capacity] and counts
// [heads, rows], of which row i may name num_blocks[i] blocks.
void check_list(const char* op,
                const at::Tensor& indices,
                const at::Tensor& counts,
                const std::vector<int64_t>& num_blocks) {
  const auto num_rows = static_cast<int64_t>(num_blocks.size());
  const int64_t capacity = indices.size(1);
  const int32_t* entries = indices.const_data_ptr<int32_t>();
  const int32_t* row_counts = counts.const_data_ptr<int32_t>();
  const int64_t most = num_rows == 0 ? 0 : *std::max_element(num_blocks.begin(), num_blocks.end());
  std::vector<int64_t> named_by(static_cast<std::size_t>(most), -1);  // the last row
  for (int64_t row = 0; row < num_rows; ++row, entries += capacity) {
    const int64_t row_blocks = num_blocks[static_cast<std::size_t>(row)];
    int64_t longest = 0;
    for (int64_t head = 0; head < counts.size(0); ++head) {
      const int64_t count = row_counts[head * num_rows + row];
      TORCH_CHECK_VALUE(0 <= count && count <= capacity, op, ": counts must be in [0, ", capacity,
                        "], the lists' capacity, got ", count);
      longest = max_of(longest, count);
    }
    for (int64_t i = 0; i < longest; ++i) {
      const int64_t block = entries[i];
      TORCH_CHECK_VALUE(0 <= block && block < row_blocks, op,
                        ": indices must name key blocks in [0, ", row_blocks, "), got ", block);
      int64_t& named = named_by[static_cast<std::size_t>(block)];
      TORCH_CHECK_VALUE(named != row, op, ": indices must be unique in each list, got ", block,
                        " twice");
      named = row;
    }
  }
}

}  // namespace

bool wants_checks() {
  const char* text = std::getenv("PROXYATTN_CHECK");
  const std::string_view setting = text == nullptr ? "" : text;
  return !setting.empty() && setting != "0";
}

void check_rows_of_lists(const char* op,
                         const at::Tensor& indices,
                         const at::Tensor& counts,
                         const std::vector<int64_t>& num_blocks) {
  const auto num_rows = static_cast<int64_t>(num_blocks.size());
  const int64_t heads_per_list = counts.size(0) / indices.size(0);
  for (int64_t list = 0; list < indices.size(0); ++list) {
    const at::Tensor own_indices = indices.select(0, list).narrow(0, 0, num_rows);
    const at::Tensor own_counts =
        counts.narrow(0, list * heads_per_list, heads_per_list).narrow(1, 0, num_rows);
    check_list(op, own_indices.cpu().contiguous(), own_counts.cpu().contiguous(), num_blocks);
  }
}

void check_block_lists(const at::Tensor& indices,
                       const at::Tensor& counts,
                       int64_t kv_len,
                       int64_t block_size) {
  constexpr const char* kOp = "block_sparse_attention";
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
  const std::vector<int64_t> num_blocks(static_cast<std::size_t>(indices.size(2)),
                                        ceil_div(kv_len, block_size));
  for (int64_t batch = 0; batch < indices.size(0); ++batch) {
    check_rows_of_lists(kOp, indices.select(0, batch), counts.select(0, batch), num_blocks);
  }
}

}  // namespace proxyattn::binding
