// Stage 3, what each head needs, first kernel, for compute capability 9.0: TMA, wgmma, specialised
// warps.
//
//   block_lse[h, n, r] = log2 of the sum over the visible keys u of block n of 2^(factor * q . k_u)
//
// for query r of the last q_block ones of head h; factor = scale * log2(e). -inf where nothing is
// visible; what rows past the last query get is never read.
//
// Grid: one persistent thread block per multiprocessor; items (problem.h) are dealt out in turn.
// Warp 0 loads, the warpgroups behind its own compute 64 rows each. Shared memory: rings of query
// and key tiles, up to 225 KB. Assumes tensors that the copy engine can address.
#pragma once

#include <cstdint>

#include "cuda/common/macros.cuh"
#include "cuda/common/warp.cuh"
#include "cuda/needs/sm90/problem.h"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/lane_keys.cuh"
#include "cuda/sm90/logit_tiles.cuh"
#include "cuda/sm90/row_sums.cuh"

namespace proxyattn::cuda::sm90 {

template <typename Traits>
struct __align__(1024) NeedStorage {
  LogitStorage<Traits> logits;
};

template <typename Traits>
PROXYATTN_DEVICE void load_need_items(const NeedProblem& p, NeedStorage<Traits>& shared) {
  QueryLoader<Traits> queries(shared.logits, p.q_map);
  KeyLoader<Traits> keys(shared.logits, p.keys);
  for (int idx = blockIdx.x; idx < p.num_items; idx += gridDim.x) {
    const NeedItem item = NeedItem::make(p, idx);
    queries.wait_slot(ptx::WaitSite::kProducerQuery);
    queries.load(item.batch, [&](int i) {
      const NeedRows rows(p, item.row_tile * Traits::kGroups + i);
      // Behind the last head there is nothing to load, but the bytes must arrive.
      const int head = min(rows.head, p.group_heads - 1);
      return make_int2(item.kv_head * p.group_heads + head, p.first_query + rows.row);
    });
    keys.load(item.batch, item.kv_head, item.first_tile, item.num_tiles);
  }
}

template <typename Traits, int kBlockKeys>
class NeedConsumer {
  using Blocks = LaneBlocks<kBlockKeys>;
  static_assert(!Blocks::kBothRows);

 public:
  PROXYATTN_DEVICE NeedConsumer(const NeedProblem& problem, NeedStorage<Traits>& shared, int group)
      : p_(problem), stream_(shared.logits, group), group_(group) {
    warp_ = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarpLanes % 4, 0);
  }

  PROXYATTN_DEVICE void run() {
    for (int idx = blockIdx.x; idx < p_.num_items; idx += gridDim.x) {
      const NeedItem item = NeedItem::make(p_, idx);
      begin(item);
      stream_.wait_query();
      PROXYATTN_NO_UNROLL
      for (int done = 0; done < item.num_tiles; done += kStretchTiles) {
        sums_.reset();
        stream_.for_each_tile(item.first_tile + done, min(kStretchTiles, item.num_tiles - done),
                              *this);
      }
      stream_.release_query();
    }
  }

  // One product's logits.
  PROXYATTN_DEVICE void operator()(float (&s)[kLaneLogits], int tile) {
    if (tile >= p_.keys.num_whole) gather_lane_keys(s);
    if ((tile + 1) * kLogitKeys > warp_limit_) {
      const int limit = p_.causal ? warp_limit_ + warp_lane() / 4 : p_.num_keys;
      mask_row_logits(s, tile * kLogitKeys + first_lane_key(),
                      {min(limit, p_.num_keys), min(limit + 8, p_.num_keys)});
    }
    typename Blocks::Values values;
    typename Blocks::Merged merged;
    sums_.template add<kBlockKeys>(s, p_.factor, values);
    Blocks::merge(values, merged, RowSumOp());
    const int block = tile * Blocks::kTileBlocks + Blocks::block(warp_lane(), 0);
    const int row = Blocks::row(warp_lane(), 0);
    // With one block in the tile two lanes hold the same value.
    const bool mine = Blocks::kTileBlocks > 1 || (warp_lane() & 2) == 0;
    if (mine && out_ != nullptr && block < p_.num_kv_blocks) {
      out_[static_cast<int64_t>(block) * p_.head_units * kGroupRows + warp_lane() / 4 + 8 * row] =
          ptx::lg2(merged[0]) + sums_.reference_of(row);
    }
  }

 private:
  PROXYATTN_DEVICE void begin(const NeedItem& item) {
    const NeedRows rows(p_, item.row_tile * Traits::kGroups + group_);
    const int warp_row = rows.row + warp_ * 16;
    const int q_block = p_.head_units * kGroupRows;
    const int head = (item.batch * p_.kv_heads + item.kv_head) * p_.group_heads + rows.head;
    out_ = rows.head < p_.group_heads
               ? p_.block_lse + static_cast<int64_t>(head) * p_.num_kv_blocks * q_block + warp_row
               : nullptr;
    warp_limit_ = p_.causal ? min(p_.num_keys, p_.position + warp_row + 1) : p_.num_keys;
  }

  const NeedProblem& p_;
  LogitStream<Traits> stream_;
  RowSums sums_;
  float* out_;      // of the warp's first row; null: there is no such head
  int warp_limit_;  // first key that this row must not see
  int group_;
  int warp_;
};

template <typename Traits, int kBlockKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    block_lse_kernel(const __grid_constant__ NeedProblem problem) {
  static_assert(sizeof(NeedStorage<Traits>) <= kLogitSharedBytes);
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& shared = *reinterpret_cast<NeedStorage<Traits>*>(raw_shared);
  // Through a shuffle, so that the compiler knows the role to be uniform in a warp.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&problem.q_map);
    ptx::prefetch_tensor_map(&problem.keys.whole);
    shared.logits.init();
    ptx::mbarrier_init_fence();
  }
  __syncthreads();  // the barriers are initialised

  if (warpgroup == 0) {
    ptx::give_back_registers<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) load_need_items<Traits>(problem, shared);
  } else {
    ptx::take_registers<Traits::kConsumerRegisters>();
    NeedConsumer<Traits, kBlockKeys>(problem, shared, warpgroup - 1).run();
  }
}

}  // namespace proxyattn::cuda::sm90
