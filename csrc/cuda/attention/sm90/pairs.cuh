// Which heads of a kv head a team works on together when query blocks have 64 rows.
//
// Heads that share a list read prefixes of it, so two of them need no more keys than the one that
// reads more. To waste little of the other's time, a pair are neighbours in the order of counts,
// which is found anew for each query block: by one warp, in registers.
#pragma once

#include <cstdint>

#include "cuda/attention/sm90/problem.h"
#include "cuda/common/macros.cuh"
#include "cuda/common/ring.cuh"
#include "cuda/common/warp.cuh"

namespace proxyattn::cuda::sm90 {

// A query head and the number of its key blocks.
struct HeadBlocks {
  int head;
  int blocks;
};
inline constexpr int kNoHead = -1;

// The two heads of a pair, the one with more blocks first; the second may be missing. Called by a
// whole warp, in which lane i knows how many blocks head i of the group reads.
PROXYATTN_DEVICE void find_pair(const Problem& p, int blocks, int pair, HeadBlocks (&found)[2]) {
  const int lane = warp_lane();
  const int heads = p.tiles.pair_group;
  int place = 0;  // of this lane's head, from the most blocks down
  for (int other = 0; other < heads; ++other) {
    const int theirs = __shfl_sync(kAllLanes, blocks, other);
    place += theirs > blocks || (theirs == blocks && other < lane);
  }
  PROXYATTN_UNROLL
  for (int i = 0; i < 2; ++i) {
    const unsigned holders = __ballot_sync(kAllLanes, lane < heads && place == 2 * pair + i);
    const int head = __ffs(static_cast<int>(holders)) - 1;  // kNoHead if nobody is
    const int theirs = __shfl_sync(kAllLanes, blocks, max(head, 0));
    found[i] = {head, head < 0 ? 0 : theirs};
  }
}

}  // namespace proxyattn::cuda::sm90
