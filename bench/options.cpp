#include "options.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "proxyattn/error.h"

namespace proxyattn::bench {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ",") + part;
  return text;
}

double parse_number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  PROXYATTN_CHECK(!text.empty() && *end == '\0', "bench: ", name, " must be a number, got ", text);
  return value;
}

int64_t parse_integer(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const int64_t value = std::strtoll(text.c_str(), &end, 10);
  PROXYATTN_CHECK(!text.empty() && *end == '\0', "bench: ", name, " must be an integer, got ",
                  text);
  return value;
}

bool set_flag(Options& options, const std::string& name) {
  const std::pair<const char*, bool*> flags[] = {{"json", &options.json},
                                                 {"list", &options.list},
                                                 {"cold", &options.cold},
                                                 {"graph", &options.graph},
                                                 {"help", &options.help}};
  for (const auto& [flag, value] : flags) {
    if (name == flag) return *value = true;
  }
  return false;
}

void set_value(Options& options, const Benchmark& benchmark, std::string name, std::string value) {
  if (name == "device") {
    PROXYATTN_CHECK(value == "cpu" || value == "cuda", "bench: --device must be cpu or cuda, got ",
                    value);
    options.device = value;
  } else if (name == "filter") {
    options.filter = value;
  } else if (name == "time-limit") {
    options.time_limit = parse_number("--time-limit", value);
  } else if (name == "repeats") {
    options.repeats = parse_integer("--repeats", value);
  } else {
    std::replace(name.begin(), name.end(), '-', '_');
    const auto& axes = benchmark.axes;
    const bool known =
        std::any_of(axes.begin(), axes.end(), [&](const Axis& axis) { return axis.name == name; });
    PROXYATTN_CHECK(known, "bench: options must be those of --help, got --", name);
    options.axes.emplace_back(name, split(value));
  }
}

}  // namespace

bool Case::has(const std::string& name) const {
  return std::any_of(values_.begin(), values_.end(),
                     [&](const auto& entry) { return entry.first == name; });
}

const std::string& Case::text(const std::string& name) const {
  for (const auto& [key, value] : values_) {
    if (key == name) return value;
  }
  throw InvalidArgument("bench: this benchmark has no axis " + name);
}

int64_t Case::integer(const std::string& name) const {
  return parse_integer(name, text(name));
}

double Case::number(const std::string& name) const {
  return parse_number(name, text(name));
}

std::string Case::name() const {
  std::string result;
  for (const auto& [key, value] : values_) {
    result += (result.empty() ? "" : " ") + key + "=" + value;
  }
  return result;
}

Options parse_options(int argc, char** argv, const Benchmark& benchmark) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    PROXYATTN_CHECK(argument.rfind("--", 0) == 0, "bench: options must begin with --, got ",
                    argument);
    const std::size_t equals = argument.find('=');
    const std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    if (equals != std::string::npos) {
      set_value(options, benchmark, name, argument.substr(equals + 1));
    } else if (!set_flag(options, name)) {
      PROXYATTN_CHECK(i + 1 < argc, "bench: --", name, " must be followed by a value");
      set_value(options, benchmark, name, argv[++i]);
    }
  }
  return options;
}

std::string usage(const Benchmark& benchmark) {
  std::ostringstream text;
  text << "bench_" << benchmark.name << ": times the " << benchmark.name << " stage\n"
       << "  --device cpu|cuda    where to run (cpu)\n"
       << "  --filter TEXT        only the cases whose name contains TEXT\n"
       << "  --time-limit SECONDS measuring per case, unless the noise falls under 0.5 % (2)\n"
       << "  --repeats COUNT      exactly this many samples\n"
       << "  --cold               empty the last-level cache before every sample\n"
       << "  --graph              replay a CUDA graph of the launch\n"
       << "  --json               JSON lines instead of a table\n"
       << "  --list               print the cases and end\n"
       << "and one option for each axis, a comma-separated list (cpu; cuda):\n";
  for (const Axis& axis : benchmark.axes) {
    text << "  --" << axis.name << " (" << joined(axis.cpu_values);
    if (axis.cuda_values != axis.cpu_values) text << "; " << joined(axis.cuda_values);
    text << ")\n";
  }
  return text.str();
}

std::vector<Case> cases_of(const Benchmark& benchmark, const Options& options) {
  std::vector<std::vector<std::pair<std::string, std::string>>> points = {{}};
  for (const Axis& axis : benchmark.axes) {
    std::vector<std::string> values = options.device == "cpu" ? axis.cpu_values : axis.cuda_values;
    for (const auto& [name, replacement] : options.axes) {
      if (name == axis.name) values = replacement;
    }
    std::vector<std::vector<std::pair<std::string, std::string>>> longer;
    for (const auto& point : points) {
      for (const std::string& value : values) {
        longer.push_back(point);
        longer.back().emplace_back(axis.name, value);
      }
    }
    points = std::move(longer);
  }
  std::vector<Case> cases;
  for (auto& point : points) {
    Case one(std::move(point));
    if (one.name().find(options.filter) != std::string::npos) cases.push_back(std::move(one));
  }
  return cases;
}

}  // namespace proxyattn::bench
