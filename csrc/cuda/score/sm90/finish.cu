#include "cuda/common/launch.h"
#include "cuda/score/sm90/finish.h"
#include "cuda/score/sm90/finish_kernel.cuh"

namespace proxyattn::cuda::sm90 {
namespace {

template <int kBlockKeys>
void launch_finish(const ScoreProblem& problem, Stream stream) {
  const int num_parts = ceil_div(problem.num_kv_blocks, kFinishCells);
  LaunchShape shape{int64_t{problem.num_lists} * problem.num_row_tiles * num_parts,
                    problem.tile_rows / problem.block_rows};
  shape.threads = kFinishThreads;
  launch<finish_scores_kernel<kBlockKeys>>(kScoreOp, shape, stream, problem, num_parts);
}

}  // namespace

void finish_scores(const ScoreProblem& problem, int block_keys, Stream stream) {
  if (block_keys == 16) {
    launch_finish<16>(problem, stream);
  } else if (block_keys == 32) {
    launch_finish<32>(problem, stream);
  } else if (block_keys == 64) {
    launch_finish<64>(problem, stream);
  } else {
    launch_finish<128>(problem, stream);
  }
}

}  // namespace proxyattn::cuda::sm90
