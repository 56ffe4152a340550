#include "harness.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "proxyattn/error.h"

#include "options.h"
#include "report.h"
#include "revision.h"

namespace proxyattn::bench {
namespace {

constexpr double kNoise = 0.005;    // stop when the median is this certain
constexpr int64_t kMinSamples = 7;  // before the noise is judged
constexpr int64_t kMaxSamples = 1000;
constexpr double kSampleSeconds = 0.5e-3;  // shorter launches are timed several at once
constexpr int64_t kMaxLaunchesPerSample = 1000;
constexpr double kWarmUpSeconds = 0.05;

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Value at a share of the way through the sorted samples.
double quantile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(place);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  const double weight = place - static_cast<double>(below);
  return sorted[below] * (1.0 - weight) + sorted[above] * weight;
}

Measurement summarize(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  Measurement result;
  result.median_s = quantile(samples, 0.5);
  result.spread = (quantile(samples, 0.75) - quantile(samples, 0.25)) / result.median_s;
  result.samples = static_cast<int64_t>(samples.size());
  return result;
}

// Half the width of the median's 95 % interval, as the notch of a box plot, over the median.
double noise_of(const Measurement& result) {
  return 1.57 * result.spread / std::sqrt(static_cast<double>(result.samples));
}

bool enough(const std::vector<double>& samples,
            const Options& options,
            std::chrono::steady_clock::time_point begin) {
  const auto count = static_cast<int64_t>(samples.size());
  if (options.repeats > 0) return count >= options.repeats;
  if (count == 0) return false;
  if (seconds_since(begin) >= options.time_limit || count >= kMaxSamples) return true;
  return count >= kMinSamples && noise_of(summarize(samples)) <= kNoise;
}

// Launches until the clocks have settled; returns the seconds that one takes.
double warm_up(Machine& machine, const Launch& launch, double time_limit) {
  const double enough_seconds = std::min(kWarmUpSeconds, time_limit);
  double once = machine.time(launch, 1, /*cold=*/false);
  for (double spent = once; spent < enough_seconds;) {
    const double left = (enough_seconds - spent) / std::max(once, 1e-6);
    const auto count = std::clamp<int64_t>(static_cast<int64_t>(left), 1, kMaxLaunchesPerSample);
    const double seconds = machine.time(launch, count, /*cold=*/false);
    once = seconds / static_cast<double>(count);
    spent += std::max(seconds, 1e-4);
  }
  return once;
}

Measurement measure(Machine& machine, const Launch& launch, const Options& options) {
  const double once = warm_up(machine, launch, options.time_limit);
  int64_t launches = 1;
  if (!options.cold) {
    const double wanted = std::ceil(kSampleSeconds / std::max(once, 1e-9));
    launches = static_cast<int64_t>(std::min<double>(wanted, kMaxLaunchesPerSample));
  }
  machine.take_sensors();  // forget the warm-up's
  const auto begin = std::chrono::steady_clock::now();
  std::vector<double> samples;
  while (!enough(samples, options, begin)) {
    const double seconds = machine.time(launch, launches, options.cold);
    samples.push_back(seconds / static_cast<double>(launches));
  }
  Measurement result = summarize(std::move(samples));
  result.sensors = machine.take_sensors();
  return result;
}

Facts facts_of(const Machine& machine, const Options& options) {
  Facts facts = machine.facts();
  facts.emplace_back("compiler", __VERSION__);
  facts.emplace_back("build", PROXYATTN_BENCH_BUILD);
  facts.emplace_back("revision", PROXYATTN_BENCH_REVISION);
  const char* family = std::getenv("PROXYATTN_FAMILY");
  if (family != nullptr) facts.emplace_back("PROXYATTN_FAMILY", family);
  facts.emplace_back("cache", options.cold ? "cold" : "warm");
  facts.emplace_back("launch", options.graph ? "CUDA graph" : "direct");
  return facts;
}

// True if the case ran and was right.
bool run_case(Machine& machine,
              const Benchmark& benchmark,
              const Case& one,
              const Options& options,
              const Report& report) {
  try {
    const Workload work = benchmark.prepare(machine, one);
    work.launch();
    machine.synchronize();
    work.check();
    const Launch launch = options.graph ? machine.as_graph(work.launch) : work.launch;
    report.measured(one, work, measure(machine, launch, options));
    return true;
  } catch (const WrongResult& error) {
    report.refused(one, "wrong", error.what());
  } catch (const std::exception& error) {
    report.refused(one, "failed", error.what());
  }
  return false;
}

int run_cases(const Benchmark& benchmark, const Options& options) {
  const std::vector<Case> cases = cases_of(benchmark, options);
  if (options.list) {
    for (const Case& one : cases) std::printf("%s\n", one.name().c_str());
    return 0;
  }
  const auto machine = options.device == "cpu" ? make_cpu_machine() : make_cuda_machine();
  const Report report(benchmark.name, options.json, cases);
  report.header(facts_of(*machine, options));
  bool all_right = true;
  for (const Case& one : cases) {
    all_right = run_case(*machine, benchmark, one, options, report) && all_right;
  }
  return all_right ? 0 : 1;
}

}  // namespace

int run_benchmark(int argc, char** argv, const Benchmark& benchmark) {
  try {
    const Options options = parse_options(argc, argv, benchmark);
    if (!options.help) return run_cases(benchmark, options);
    std::printf("%s", usage(benchmark).c_str());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}

}  // namespace proxyattn::bench
