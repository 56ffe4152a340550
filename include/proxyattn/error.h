// Errors of the core: a wrong argument, or a CUDA call that failed. Both carry a whole sentence.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace proxyattn {

// A value or shape breaks a rule. Text: "<op>: <argument> must <rule>, got <value>".
class InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// A CUDA call failed. Text: "<op>: <call> failed: <error name> (<error text>)".
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Parts>
std::string join_message(const Parts&... parts) {
  std::ostringstream text;
  text << std::boolalpha;
  (text << ... << parts);
  return text.str();
}

}  // namespace proxyattn

#define PROXYATTN_CHECK(condition, ...)                                           \
  do {                                                                            \
    if (!(condition)) {                                                           \
      throw ::proxyattn::InvalidArgument(::proxyattn::join_message(__VA_ARGS__)); \
    }                                                                             \
  } while (false)
