#include "report.h"

#include <algorithm>
#include <cstdio>

namespace proxyattn::bench {
namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + '"';
}

std::string number(double value, const char* format = "%.6g") {
  char text[64];
  std::snprintf(text, sizeof(text), format, value);
  return text;
}

// An empty cell where there is nothing to say.
std::string cell(double value, const char* format) {
  return value > 0 ? number(value, format) : "";
}

double per_second(double amount, const Measurement& result, double unit) {
  return result.median_s > 0 ? amount / result.median_s / unit : 0;
}

}  // namespace

Report::Report(const std::string& benchmark, bool json, const std::vector<Case>& cases)
    : benchmark_(benchmark), json_(json), case_width_(static_cast<int>(benchmark.size())) {
  if (cases.empty()) return;
  for (const auto& [key, value] : cases.front().values()) {
    const auto differs = [&key = key, &value = value](const Case& one) {
      return one.text(key) != value;
    };
    const bool is_first = key == cases.front().values().front().first;  // a row needs some name
    if (is_first || std::any_of(cases.begin(), cases.end(), differs)) {
      varying_.push_back(key);
    } else {
      fixed_ += (fixed_.empty() ? "" : " ") + key + "=" + value;
    }
  }
  for (const Case& one : cases) {
    case_width_ = std::max(case_width_, static_cast<int>(short_name(one).size()));
  }
}

std::string Report::short_name(const Case& one) const {
  std::string name;
  for (const std::string& key : varying_) {
    name += (name.empty() ? "" : " ") + key + "=" + one.text(key);
  }
  return name;
}

void Report::header(const Facts& facts) const {
  if (json_) {
    std::string line = "{\"type\": \"header\", \"bench\": " + quoted(benchmark_);
    for (const auto& [key, value] : facts) line += ", " + quoted(key) + ": " + quoted(value);
    std::printf("%s}\n", line.c_str());
  } else {
    for (const auto& [key, value] : facts) std::printf("# %s: %s\n", key.c_str(), value.c_str());
    std::printf("# every case: %s\n", fixed_.c_str());
    std::printf("# dense: the TFLOPS of a dense kernel that takes as long\n");
    std::printf("%-*s %10s %8s %7s %8s %8s %8s %6s %5s\n", case_width_, benchmark_.c_str(),
                "median ms", "spread", "samples", "TFLOPS", "dense", "GB/s", "MHz", "W");
  }
  std::fflush(stdout);
}

std::string Report::json_head(const Case& one, const std::string& status) const {
  std::string line = "{\"type\": \"case\", \"bench\": " + quoted(benchmark_) + ", \"case\": {";
  bool first = true;
  for (const auto& [key, value] : one.values()) {
    line += (first ? "" : ", ") + quoted(key) + ": " + quoted(value);
    first = false;
  }
  return line + "}, \"status\": " + quoted(status);
}

void Report::measured(const Case& one, const Workload& work, const Measurement& result) const {
  const double tflops = per_second(work.flops, result, 1e12);
  const double dense = per_second(work.dense_flops, result, 1e12);
  const double gigabytes = per_second(work.bytes, result, 1e9);
  const double clock = result.sensors ? result.sensors->sm_clock_mhz : 0;
  const double power = result.sensors ? result.sensors->power_watts : 0;
  if (json_) {
    std::string line = json_head(one, "ok");
    line += ", \"median_ms\": " + number(result.median_s * 1e3);
    line += ", \"spread\": " + number(result.spread);
    line += ", \"samples\": " + std::to_string(result.samples);
    line += ", \"tflops\": " + number(tflops) + ", \"dense_tflops\": " + number(dense);
    line += ", \"gb_per_s\": " + number(gigabytes);
    line += ", \"sm_clock_mhz\": " + number(clock) + ", \"power_w\": " + number(power);
    std::printf("%s}\n", line.c_str());
  } else {
    std::printf("%-*s %10s %7s%% %7lld %8s %8s %8s %6s %5s\n", case_width_, short_name(one).c_str(),
                number(result.median_s * 1e3, "%.4f").c_str(),
                number(result.spread * 100, "%.2f").c_str(), static_cast<long long>(result.samples),
                cell(tflops, "%.3g").c_str(), cell(dense, "%.3g").c_str(),
                cell(gigabytes, "%.4g").c_str(), cell(clock, "%.0f").c_str(),
                cell(power, "%.0f").c_str());
  }
  std::fflush(stdout);
}

void Report::refused(const Case& one, const std::string& status, const std::string& reason) const {
  if (json_) {
    std::printf("%s, \"reason\": %s}\n", json_head(one, status).c_str(), quoted(reason).c_str());
  } else {
    std::printf("%-*s %s: %s\n", case_width_, short_name(one).c_str(), status.c_str(),
                reason.c_str());
  }
  std::fflush(stdout);
}

}  // namespace proxyattn::bench
