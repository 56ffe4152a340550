// The formulas of the stages in double, for the C++ tests.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace proxyattn::test {

struct Place {
  int64_t batch, token, head;
};

inline double dot(const Tensor& a, const Place& at_a, const Tensor& b, const Place& at_b) {
  double sum = 0.0;
  for (int64_t d = 0; d < a.head_dim; ++d) {
    sum += a.at(at_a.batch, at_a.token, at_a.head, d) * b.at(at_b.batch, at_b.token, at_b.head, d);
  }
  return sum;
}

inline double log_sum_exp(const std::vector<double>& scores) {
  if (scores.empty()) return -INFINITY;
  const double largest = *std::max_element(scores.begin(), scores.end());
  double sum = 0.0;
  for (const double score : scores) sum += std::exp(score - largest);
  return largest + std::log(sum);
}

// log of the softmax of a query over the first `num_seen` keys.
inline std::vector<double> log_softmax(const Tensor& q,
                                       const Place& query,
                                       const Tensor& k,
                                       int64_t kv_head,
                                       int64_t num_seen,
                                       double scale) {
  std::vector<double> scores;
  for (int64_t j = 0; j < num_seen; ++j) {
    scores.push_back(scale * dot(q, query, k, {query.batch, j, kv_head}));
  }
  const double lse = log_sum_exp(scores);
  for (double& score : scores) score -= lse;
  return scores;
}

}  // namespace proxyattn::test
