// Microbenchmarks without a framework. A bench_<stage>.cpp declares axes and a function that
// prepares data for one point of them; the harness does the rest: it runs every point, refuses to
// time a wrong result, warms up, measures until the noise is small, and reports rates.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "machine.h"

namespace proxyattn::bench {

// A dimension that a benchmark is run over; `--<name> v1,v2` on the command line replaces its
// values. CPUs get smaller problems.
struct Axis {
  std::string name;
  std::vector<std::string> cpu_values;
  std::vector<std::string> cuda_values;
};

// An axis with the same values everywhere.
inline Axis axis(const std::string& name, const std::vector<std::string>& values) {
  return {name, values, values};
}

// One value for each axis.
class Case {
 public:
  explicit Case(std::vector<std::pair<std::string, std::string>> values)
      : values_(std::move(values)) {}

  bool has(const std::string& name) const;
  const std::string& text(const std::string& name) const;
  int64_t integer(const std::string& name) const;
  double number(const std::string& name) const;
  const std::vector<std::pair<std::string, std::string>>& values() const { return values_; }
  std::string name() const;  // "length=8192 lists=all"

 private:
  std::vector<std::pair<std::string, std::string>> values_;
};

// What is timed. The closures own the data.
struct Workload {
  Launch launch;                // queues the work once
  std::function<void()> check;  // throws WrongResult unless the last launch's outputs are right
  double flops = 0;             // of one launch, as executed
  double dense_flops = 0;       // of the dense attention it stands for; 0: none
  double bytes = 0;             // that must cross memory at least once; 0: not memory bound
};

class WrongResult : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Benchmark {
  std::string name;
  std::vector<Axis> axes;
  std::function<Workload(Machine&, const Case&)> prepare;
};

// The main function of a benchmark: 0 if every case ran and was right, 1 if one was not, 2 for a
// wrong command line.
int run_benchmark(int argc, char** argv, const Benchmark& benchmark);

}  // namespace proxyattn::bench
