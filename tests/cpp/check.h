// The C++ tests' whole framework: named tests that check, and a main that runs them all.
//
//   TEST(addition_works) { CHECK_EQ(1 + 1, 2); }
//   int main() { return proxyattn::test::run_all(); }
//
// A failed check is reported with its place and values and the test goes on.
#pragma once

#include <cmath>
#include <cstdio>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace proxyattn::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

struct Registration {
  Registration(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

// Checks made and failed so far. Of a flood of failures the first ones are printed.
struct Tally {
  long checks = 0;
  long failures = 0;
};

inline Tally& tally() {
  static Tally counts;
  return counts;
}

inline void fail(const char* file, int line, const std::string& text) {
  constexpr long kMaxPrinted = 50;
  if (tally().failures++ < kMaxPrinted) {
    std::fprintf(stderr, "%s:%d: %s\n", file, line, text.c_str());
  }
}

template <typename... Parts>
void check(bool passed, const char* file, int line, const Parts&... parts) {
  ++tally().checks;
  if (passed) return;
  std::ostringstream text;
  text.precision(9);
  (text << ... << parts);
  fail(file, line, text.str());
}

// Within the tolerance; infinities and NaNs must be the same.
inline bool near(double got, double expected, double tolerance) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= tolerance;
}

template <typename Got, typename Expected>
void check_equal(
    const Got& got, const Expected& expected, const char* file, int line, const char* text) {
  check(got == expected, file, line, text, " must be ", expected, ", got ", got);
}

inline void check_near(
    double got, double expected, double tolerance, const char* file, int line, const char* text) {
  check(near(got, expected, tolerance), file, line, text, " must be within ", tolerance, " of ",
        expected, ", got ", got);
}

inline int run_all() {
  for (const Test& test : all_tests()) {
    const Tally before = tally();
    try {
      test.run();
    } catch (const std::exception& error) {
      fail(test.name, 0, std::string("exception: ") + error.what());
    }
    if (tally().checks == before.checks) fail(test.name, 0, "the test checked nothing");
    std::printf("%s %s, %ld checks\n", tally().failures == before.failures ? "ok  " : "FAIL",
                test.name, tally().checks - before.checks);
  }
  return tally().failures == 0 && tally().checks > 0 ? 0 : 1;
}

}  // namespace proxyattn::test

#define TEST(name)                                                               \
  static void name();                                                            \
  static const ::proxyattn::test::Registration registration_##name(#name, name); \
  static void name()

#define CHECK(condition) \
  ::proxyattn::test::check(static_cast<bool>(condition), __FILE__, __LINE__, #condition)

#define CHECK_EQ(got, expected) \
  ::proxyattn::test::check_equal(got, expected, __FILE__, __LINE__, #got)

#define CHECK_NEAR(got, expected, tolerance) \
  ::proxyattn::test::check_near(got, expected, tolerance, __FILE__, __LINE__, #got)

// The expression must throw `Error` with exactly this text.
#define CHECK_THROWS(Error, text, ...)                                                           \
  do {                                                                                           \
    std::string what_ = "nothing";                                                               \
    try {                                                                                        \
      __VA_ARGS__;                                                                               \
    } catch (const Error& error) {                                                               \
      what_ = error.what();                                                                      \
    }                                                                                            \
    ::proxyattn::test::check(what_ == (text), __FILE__, __LINE__, #__VA_ARGS__ " must throw \"", \
                             text, "\", got \"", what_, "\"");                                   \
  } while (false)
