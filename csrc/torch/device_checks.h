// What only the device knows, looked at: for debugging, since a GPU is waited for.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace proxyattn::binding {

// PROXYATTN_CHECK in the environment asks every call for the checks of this header.
bool wants_checks();

// Lists of one batch entry or of packed sequences, indices [lists, rows, capacity] and counts
// [heads, rows]: counts are in [0, capacity], and the entries that they cover are key blocks, each
// once in a list. Row i may name num_blocks[i] of them; rows behind those are not looked at. Copies
// a list at a time to the host.
void check_rows_of_lists(const char* op,
                         const at::Tensor& indices,
                         const at::Tensor& counts,
                         const std::vector<int64_t>& num_blocks);

struct SequenceLengths {
  std::vector<int64_t> q;
  std::vector<int64_t> kv;

  // Key blocks of the sequence of each query block of all of them.
  std::vector<int64_t> num_blocks(int64_t block_size) const;
};

// Packed sequences, and pages of those that are in use, lie where the tensors and the capacities
// let them. Types and shapes are known to be right.
SequenceLengths check_lengths(const char* op,
                              const at::Tensor& q,
                              const at::Tensor& k,
                              const at::Tensor& cu_seqlens_q,
                              const std::optional<at::Tensor>& cu_seqlens_k,
                              int64_t max_seqlen_q,
                              int64_t max_seqlen_k,
                              const std::optional<at::Tensor>& block_table,
                              const std::optional<at::Tensor>& seqused_k);

}  // namespace proxyattn::binding
