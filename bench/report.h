// What a benchmark prints: a table to read, or JSON lines for compare.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "harness.h"

namespace proxyattn::bench {

struct Measurement {
  double median_s = 0;
  double spread = 0;  // interquartile range over the median
  int64_t samples = 0;
  std::optional<Sensors> sensors;
};

class Report {
 public:
  Report(const std::string& benchmark, bool json, const std::vector<Case>& cases);

  void header(const Facts& facts) const;
  void measured(const Case& one, const Workload& work, const Measurement& result) const;
  // `status` is "wrong" or "failed".
  void refused(const Case& one, const std::string& status, const std::string& reason) const;

 private:
  std::string json_head(const Case& one, const std::string& status) const;
  // The first axis and those that tell the cases apart; the others are said once, in the header.
  std::string short_name(const Case& one) const;

  std::string benchmark_;
  bool json_;
  std::vector<std::string> varying_;
  std::string fixed_;
  int case_width_;
};

}  // namespace proxyattn::bench
