#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "proxyattn/error.h"

#include "random.h"

namespace proxyattn::bench {
namespace {

constexpr int64_t kMixRange = 64;  // the longest over the shortest
constexpr int64_t kMixTotal = 4;   // all tokens over the longest

std::vector<int64_t> lengths_of(const std::string& seqs, int64_t length) {
  if (seqs == "batch") return {};
  if (seqs == "mix") return mix_lengths(length);
  char* end = nullptr;
  const int64_t count = std::strtoll(seqs.c_str(), &end, 10);
  PROXYATTN_CHECK(*end == '\0' && count >= 1,
                  "bench: seqs must be batch, mix or a number of sequences, got ", seqs);
  return std::vector<int64_t>(static_cast<std::size_t>(count), length);
}

// 0, ..., count - 1 in random order.
std::vector<int32_t> shuffled(int64_t count, uint64_t seed) {
  std::vector<int32_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  for (std::size_t i = order.size(); i > 1; --i) {
    std::swap(order[i - 1], order[static_cast<std::size_t>(mix(seed + i) % i)]);
  }
  return order;
}

}  // namespace

std::vector<Axis> pack_axes() {
  return {axis("seqs", {"batch"}), axis("page", {"0"}), axis("calls", {"one"})};
}

// Evenly spread logarithms, bent towards the short until the sum is right.
std::vector<int64_t> mix_lengths(int64_t longest) {
  const auto bent = [&](double power) {
    std::vector<int64_t> lengths;
    for (int64_t i = 0; i < kMixSequences; ++i) {
      const double place = static_cast<double>(i) / static_cast<double>(kMixSequences - 1);
      const double shrunk = std::pow(static_cast<double>(kMixRange), std::pow(place, power) - 1.0);
      lengths.push_back(std::max<int64_t>(1, std::llround(shrunk * static_cast<double>(longest))));
    }
    return lengths;
  };
  double low = 0.1;
  double high = 20.0;
  for (int step = 0; step < 60; ++step) {
    const double middle = (low + high) / 2;
    const std::vector<int64_t> lengths = bent(middle);
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    (total > kMixTotal * longest ? low : high) = middle;
  }
  const std::vector<int64_t> lengths = bent(high);
  std::vector<int64_t> mixed;
  for (const int32_t i : shuffled(kMixSequences, 1)) {
    mixed.push_back(lengths[static_cast<std::size_t>(i)]);
  }
  return mixed;
}

Pack::Pack(Machine& machine, const Case& one)
    : longest_(problem_of(one)), num_rows_(longest_.num_blocks()) {
  const std::vector<int64_t> lengths = lengths_of(one.text("seqs"), longest_.length);
  const int64_t page_len = one.integer("page");
  const std::string& calls = one.text("calls");
  PROXYATTN_CHECK(calls == "one" || calls == "each", "bench: calls must be one or each, got ",
                  calls);
  one_by_one_ = calls == "each";
  PROXYATTN_CHECK(!lengths.empty() || (page_len == 0 && !one_by_one_),
                  "bench: page must be 0 and calls one where seqs is batch, got ", one.name());
  PROXYATTN_CHECK(page_len == 0 || !one_by_one_,
                  "bench: page must be 0 where calls is each, got page=", page_len);
  int64_t tokens = longest_.batch * longest_.length;
  if (!lengths.empty()) {
    PROXYATTN_CHECK(longest_.batch == 1, "bench: batch must be 1 where sequences are packed, got ",
                    longest_.batch);
    tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  }
  const int64_t q_elements = tokens * longest_.q_heads * longest_.head_dim;
  const int64_t kv_elements = tokens * longest_.kv_heads * longest_.head_dim;
  q_ = random_buffer(machine, q_elements, longest_.dtype, 1);
  k_ = random_buffer(machine, kv_elements, longest_.dtype, 2);
  v_ = random_buffer(machine, kv_elements, longest_.dtype, 3);
  out_ = empty_buffer(machine, q_elements * element_bytes(longest_.dtype));
  if (lengths.empty()) {
    parts_.push_back({longest_, 0, 0});
  } else {
    pack(machine, lengths, page_len);
  }
}

void Pack::pack(Machine& machine, const std::vector<int64_t>& lengths, int64_t page_len) {
  std::vector<int32_t> starts = {0};
  int64_t first_row = 0;
  for (const int64_t length : lengths) {
    Problem problem = longest_;
    problem.length = length;
    parts_.push_back({problem, starts.back(), first_row});
    starts.push_back(starts.back() + static_cast<int32_t>(length));
    first_row += problem.num_blocks();
  }
  q_starts_ = uploaded(machine, starts);
  packed_.q_starts = q_starts_->as<int32_t>();
  packed_.total_q = starts.back();
  num_rows_ = max_packed_blocks(packed_, count(), longest_.block_size);
  if (page_len > 0) return put_in_pages(machine, page_len);
  kv_starts_ = uploaded(machine, starts);
  packed_.kv_starts = kv_starts_->as<int32_t>();
  packed_.total_kv = starts.back();
}

void Pack::put_in_pages(Machine& machine, int64_t page_len) {
  const int64_t table_pages = ceil_div(longest_.length, page_len);
  int64_t num_pages = 0;
  for (const Part& part : parts_) num_pages += ceil_div(part.problem.length, page_len);
  const std::vector<int32_t> order = shuffled(num_pages, 2);
  const int64_t token_bytes = longest_.kv_heads * longest_.head_dim * element_bytes(longest_.dtype);
  const int64_t cache_bytes = num_pages * page_len * token_bytes;
  k_pages_ = empty_buffer(machine, cache_bytes);
  v_pages_ = empty_buffer(machine, cache_bytes);
  std::vector<int32_t> lengths;
  std::vector<int32_t> table(static_cast<std::size_t>(count() * table_pages), -1);
  for (const auto& [from, to] : {std::pair{k_, k_pages_}, std::pair{v_, v_pages_}}) {
    const auto tokens = download(machine, from->as<std::byte>(), from->bytes());
    std::vector<std::byte> cache(static_cast<std::size_t>(cache_bytes), std::byte{0xff});
    std::size_t next = 0;
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      const Part& part = parts_[i];
      for (int64_t token = 0; token < part.problem.length; token += page_len) {
        const int32_t page = order[next++];
        const int64_t row = static_cast<int64_t>(i) * table_pages + token / page_len;
        table[static_cast<std::size_t>(row)] = page;
        const int64_t bytes = min_of(page_len, part.problem.length - token) * token_bytes;
        std::copy_n(tokens.begin() + (part.first_token + token) * token_bytes, bytes,
                    cache.begin() + page * page_len * token_bytes);
      }
    }
    machine.upload(to->data(), cache.data(), cache_bytes);
  }
  for (const Part& part : parts_) lengths.push_back(static_cast<int32_t>(part.problem.length));
  kv_lens_ = uploaded(machine, lengths);
  page_table_ = uploaded(machine, table);
  packed_.kv_lens = kv_lens_->as<int32_t>();
  packed_.page_table = page_table_->as<int32_t>();
  packed_.table_pages = table_pages;
  packed_.num_pages = num_pages;
  packed_.page_len = page_len;
  packed_.max_total_kv = packed_.total_q;
}

std::vector<int64_t> Pack::sample() const {
  const auto longest = std::max_element(
      parts_.begin(), parts_.end(),
      [](const Part& a, const Part& b) { return a.problem.length < b.problem.length; });
  std::vector<int64_t> places = {0, longest - parts_.begin(), count() - 1};
  std::sort(places.begin(), places.end());
  places.erase(std::unique(places.begin(), places.end()), places.end());
  return places;
}

}  // namespace proxyattn::bench
