// The numbers that say where packed sequences are, one by one.
#include "checks.h"
#include "common/math.h"
#include "device_checks.h"
#include "ops.h"
#include "packed.h"

namespace proxyattn::binding {
namespace {

// On the host.
std::vector<int64_t> numbers_of(const at::Tensor& tensor) {
  const at::Tensor host = tensor.cpu().contiguous();
  const int32_t* first = host.const_data_ptr<int32_t>();
  return {first, first + host.numel()};
}

// From one start to the next, each in a tensor of `total` tokens.
std::vector<int64_t> lengths_between(const char* op,
                                     const char* name,
                                     const std::vector<int64_t>& starts,
                                     int64_t total) {
  std::vector<int64_t> lengths;
  for (std::size_t i = 0; i < starts.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= starts[i] && starts[i] <= total, op, ": ", name, " must be in [0, ",
                      total, "], got ", name, "[", i, "]=", starts[i]);
    if (i == 0) continue;
    TORCH_CHECK_VALUE(starts[i - 1] <= starts[i], op, ": ", name, " must not decrease, got ", name,
                      "[", i, "]=", starts[i], " after ", starts[i - 1]);
    lengths.push_back(starts[i] - starts[i - 1]);
  }
  return lengths;
}

void check_capacity(const char* op,
                    const char* name,
                    const std::vector<int64_t>& lengths,
                    const char* capacity_name,
                    int64_t capacity) {
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    TORCH_CHECK_VALUE(lengths[i] <= capacity, op, ": ", name, " must give a sequence at most ",
                      capacity_name, "=", capacity, " tokens, got ", lengths[i], " for sequence ",
                      i);
  }
}

// Keys of each sequence, of which there is room for `held`.
std::vector<int64_t> used_lengths(const char* op,
                                  const at::Tensor& seqused_k,
                                  const std::vector<int64_t>& held) {
  const std::vector<int64_t> lengths = numbers_of(seqused_k);
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    TORCH_CHECK_VALUE(0 <= lengths[i] && lengths[i] <= held[i], op, ": seqused_k must be in [0, ",
                      held[i], "], got seqused_k[", i, "]=", lengths[i]);
  }
  return lengths;
}

void check_pages(const char* op,
                 const at::Tensor& block_table,
                 const std::vector<int64_t>& kv_lens,
                 int64_t num_pages,
                 int64_t page_len) {
  const std::vector<int64_t> table = numbers_of(block_table);
  for (std::size_t i = 0; i < kv_lens.size(); ++i) {
    const auto row = table.begin() + static_cast<int64_t>(i) * block_table.size(1);
    for (int64_t page = 0; page < ceil_div(kv_lens[i], page_len); ++page) {
      TORCH_CHECK_VALUE(0 <= row[page] && row[page] < num_pages, op,
                        ": block_table must name pages in [0, ", num_pages, "), got block_table[",
                        i, ", ", page, "]=", row[page]);
    }
  }
}

}  // namespace

std::vector<int64_t> SequenceLengths::num_blocks(int64_t block_size) const {
  std::vector<int64_t> blocks;
  for (std::size_t i = 0; i < q.size(); ++i) {
    const auto rows = static_cast<std::size_t>(ceil_div(q[i], block_size));
    blocks.insert(blocks.end(), rows, ceil_div(kv[i], block_size));
  }
  return blocks;
}

SequenceLengths check_lengths(const char* op,
                              const at::Tensor& q,
                              const at::Tensor& k,
                              const at::Tensor& cu_seqlens_q,
                              const std::optional<at::Tensor>& cu_seqlens_k,
                              int64_t max_seqlen_q,
                              int64_t max_seqlen_k,
                              const std::optional<at::Tensor>& block_table,
                              const std::optional<at::Tensor>& seqused_k) {
  SequenceLengths lengths;
  lengths.q = lengths_between(op, "cu_seqlens_q", numbers_of(cu_seqlens_q), q.size(0));
  check_capacity(op, "cu_seqlens_q", lengths.q, "max_seqlen_q", max_seqlen_q);
  if (block_table.has_value()) {
    const int64_t held = min_of(max_seqlen_k, block_table->size(1) * k.size(1));
    lengths.kv = used_lengths(op, *seqused_k, std::vector<int64_t>(lengths.q.size(), held));
    check_pages(op, *block_table, lengths.kv, k.size(0), k.size(1));
    return lengths;
  }
  lengths.kv = lengths_between(op, "cu_seqlens_k", numbers_of(*cu_seqlens_k), k.size(0));
  if (seqused_k.has_value()) {
    for (int64_t& held : lengths.kv) held = min_of(held, max_seqlen_k);
    lengths.kv = used_lengths(op, *seqused_k, lengths.kv);
  } else {
    check_capacity(op, "cu_seqlens_k", lengths.kv, "max_seqlen_k", max_seqlen_k);
  }
  return lengths;
}

void check_sequences(const at::Tensor& q,
                     const at::Tensor& k,
                     const at::Tensor& cu_seqlens_q,
                     const std::optional<at::Tensor>& cu_seqlens_k,
                     int64_t max_seqlen_q,
                     int64_t max_seqlen_k,
                     const std::optional<at::Tensor>& block_table,
                     const std::optional<at::Tensor>& seqused_k) {
  constexpr const char* kOp = "check_sequences";
  const PackedInputs inputs(kOp, q, k, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k);
  check_lengths(kOp, q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table,
                seqused_k);
}

}  // namespace proxyattn::binding
