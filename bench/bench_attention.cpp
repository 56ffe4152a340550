// Attention over block lists. TFLOPS count the whole blocks that were executed; all blocks are
// also counted as dense attention is. PROXYATTN_FAMILY=<family> in the environment picks another
// kernel family than the best. Packed sequences have lists each as a batch of its length would.
#include "checks.h"
#include "lists.h"
#include "pack.h"
#include "problem.h"

namespace {

using namespace proxyattn::bench;
using proxyattn::AttentionParams;

// Lists of all sequences, where a call over them wants them.
struct PackedLists {
  int64_t list_heads = 1;
  std::vector<int32_t> indices;  // [list_heads, rows, key blocks of the longest]
  std::vector<int32_t> counts;   // [q_heads, rows]
  double flops = 0;
  double dense_flops = 0;  // where all blocks are read
};

// Rows of one sequence into those of all, each of `width` and, in the end, `pitch` entries.
void put_rows(const std::vector<int32_t>& from,
              int64_t rows,
              int64_t width,
              std::vector<int32_t>& to,
              int64_t first_row,
              int64_t all_rows,
              int64_t pitch) {
  const int64_t count = static_cast<int64_t>(from.size()) / width;
  to.resize(static_cast<std::size_t>(count / rows * all_rows * pitch), -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i / rows * all_rows + first_row + i % rows;
    std::copy_n(from.begin() + i * width, width, to.begin() + row * pitch);
  }
}

PackedLists lists_of(const Pack& pack, const std::string& kind) {
  PackedLists all;
  const int64_t capacity = pack.longest().num_blocks();
  for (int64_t i = 0; i < pack.count(); ++i) {
    const Problem problem = pack.problem(i);
    BlockLists lists = make_lists(problem, kind);
    all.list_heads = lists.list_heads;
    all.flops += problem.block_flops(lists.num_executed);
    if (lists.indices.empty()) all.dense_flops += problem.dense_flops();
    if (!pack.is_packed()) {
      all.indices = std::move(lists.indices);
      all.counts = std::move(lists.counts);
      return all;
    }
    if (lists.indices.empty()) continue;
    const int64_t rows = problem.num_blocks();
    put_rows(lists.indices, rows, rows, all.indices, pack.first_row(i), pack.num_rows(), capacity);
    put_rows(lists.counts, rows, 1, all.counts, pack.first_row(i), pack.num_rows(), 1);
  }
  return all;
}

Workload prepare(Machine& machine, const Case& one) {
  const auto pack = std::make_shared<Pack>(machine, one);
  const PackedLists lists = lists_of(*pack, one.text("lists"));
  const auto indices = uploaded(machine, lists.indices);
  const auto counts = uploaded(machine, lists.counts);

  AttentionParams params = attention_params(pack->longest());
  pack->place(params);
  params.rows = params.list_rows;
  params.list_heads = lists.list_heads;
  params.indices = indices->as<int32_t>();
  params.counts = counts->as<int32_t>();
  const auto alone = [pack, params](int64_t i) {
    AttentionParams own = pack->alone(params, i);
    if (pack->is_packed()) own.rows = {0, pack->problem(i).num_blocks()};
    return own;
  };
  std::vector<AttentionParams> calls;
  for (int64_t i = 0; pack->one_by_one() && i < pack->count(); ++i) calls.push_back(alone(i));
  if (!pack->one_by_one()) calls.push_back(params);
  int64_t workspace_bytes = 0;
  for (const AttentionParams& call : calls) {
    const int64_t bytes = machine.stages().block_sparse_attention_workspace_bytes(call);
    workspace_bytes = std::max(workspace_bytes, bytes);
  }
  const auto workspace = empty_buffer(machine, workspace_bytes);
  for (AttentionParams& call : calls) {
    call.workspace = workspace->data();
    call.workspace_bytes = workspace_bytes;
  }

  Workload work;
  work.launch = [&machine, calls, pack, indices, counts, workspace] {
    for (const AttentionParams& call : calls) {
      machine.stages().block_sparse_attention(call, machine.stream());
    }
  };
  work.check = [&machine, pack, alone] {
    for (const int64_t i : pack->sample()) check_attention(machine, alone(i));
  };
  work.flops = lists.flops;
  work.dense_flops = lists.dense_flops;
  return work;
}

std::vector<Axis> axes() {
  std::vector<Axis> all = {{"length", {"2048"}, {"8192", "32768", "131072"}},
                           {"lists",
                            {"all", "random:0.2", "nested:0.2"},
                            {"all", "random:0.2", "random:0.05", "nested:0.2", "nested:0.05"}},
                           {"q_heads", {"8"}, {"32"}},
                           {"kv_heads", {"2"}, {"8"}},
                           axis("head_dim", {"128"}),
                           axis("block_size", {"128", "64"}),
                           axis("causal", {"1"}),
                           axis("batch", {"1"}),
                           {"dtype", {"bf16", "fp32"}, {"bf16"}}};
  for (const Axis& axis : pack_axes()) all.push_back(axis);
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  return run_benchmark(argc, argv, {"attention", axes(), prepare});
}
