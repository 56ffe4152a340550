// The command line that all benchmarks share.
#pragma once

#include <string>
#include <vector>

#include "harness.h"

namespace proxyattn::bench {

struct Options {
  std::string device = "cpu";
  std::string filter;       // run the cases whose name contains this
  double time_limit = 2.0;  // seconds of measuring per case
  int64_t repeats = 0;      // exactly this many samples; 0: until the noise is small
  bool json = false;
  bool list = false;
  bool cold = false;
  bool graph = false;
  bool help = false;
  std::vector<std::pair<std::string, std::vector<std::string>>> axes;  // overrides
};

// Throws InvalidArgument. Axis names are checked against the benchmark's.
Options parse_options(int argc, char** argv, const Benchmark& benchmark);
std::string usage(const Benchmark& benchmark);

// Every combination of the axes' values, the last axis fastest.
std::vector<Case> cases_of(const Benchmark& benchmark, const Options& options);

}  // namespace proxyattn::bench
