#include "cuda/common/launch.h"
#include "cuda/score/sm90/finish.h"
#include "cuda/score/sm90/finish_kernel.cuh"
#include "cuda/score/sm90/slots_kernel.cuh"

namespace proxyattn::cuda::sm90 {
namespace {

// Of packed sequences a pass may have far fewer row tiles than the capacities allow: as many thread
// blocks as fill a device a few times over walk those that there are.
constexpr int64_t kMaxWalkers = 4096;

template <int kBlockKeys>
void launch_finish(const ScoreProblem& problem, int64_t max_tiles, Stream stream) {
  const int num_parts = ceil_div(problem.num_kv_blocks, kFinishCells);
  const int64_t tile_blocks = problem.tile_rows / problem.block_rows;
  if (problem.is_packed()) {
    max_tiles = min_of(max_tiles, max_of<int64_t>(1, kMaxWalkers / (num_parts * tile_blocks)));
  }
  LaunchShape shape{max_tiles * num_parts, tile_blocks};
  shape.threads = kFinishThreads;
  launch<finish_scores_kernel<kBlockKeys>>(kScoreOp, shape, stream, problem, num_parts);
}

}  // namespace

void find_slots(const ScoreProblem& problem,
                ScoreSlots* slots,
                int32_t* pass_tiles,
                int64_t num_passes,
                int64_t pass_slots,
                Stream stream) {
  LaunchShape shape{1};
  shape.threads = kSlotsThreads;
  launch<find_slots_kernel>(kScoreOp, shape, stream, problem, slots, pass_tiles,
                            static_cast<int>(num_passes), static_cast<int>(pass_slots));
}

void finish_scores(const ScoreProblem& problem, int block_keys, int64_t max_tiles, Stream stream) {
  if (max_tiles == 0) return;
  if (block_keys == 16) {
    launch_finish<16>(problem, max_tiles, stream);
  } else if (block_keys == 32) {
    launch_finish<32>(problem, max_tiles, stream);
  } else if (block_keys == 64) {
    launch_finish<64>(problem, max_tiles, stream);
  } else {
    launch_finish<128>(problem, max_tiles, stream);
  }
}

}  // namespace proxyattn::cuda::sm90
