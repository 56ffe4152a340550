// What there is to score of one batch entry or packed sequence, in terms host and device share.
#pragma once

namespace proxyattn::cuda::sm90 {

// What a call scores of one batch entry or packed sequence.
struct ScoreSpan {
  int batch;           // of the tensors
  int first_row;       // sampled query in q_proxy
  int num_rows;        // sampled queries
  int first_limit;     // causal: sampled keys that row 0 sees, maybe negative
  int num_keys;        // sampled keys
  int first_key_tile;  // in k_proxy
  int first_block;     // query block of row 0 in the output
};

// Where the slots and the row tiles of a sequence's lists begin among those of all.
struct ScoreSlots {
  int first_slot;
  int first_tile;
  int list_slots;  // of each of its lists
  int list_tiles;
};

}  // namespace proxyattn::cuda::sm90
