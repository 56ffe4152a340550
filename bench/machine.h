// The device that a benchmark runs on: its memory, its stage functions, and how a launch is timed.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "proxyattn/attention.h"
#include "proxyattn/needs.h"
#include "proxyattn/pipeline.h"
#include "proxyattn/pool.h"
#include "proxyattn/score.h"
#include "proxyattn/select.h"

#include "common/tokens.h"

namespace proxyattn::bench {

// The core's functions of one device. The CPU ignores the stream.
struct Stages {
  void (*pool_heads)(const PoolParams&, Stream);
  int64_t (*score_blocks_workspace_bytes)(const ScoreParams&);
  void (*score_blocks)(const ScoreParams&, Stream);
  int64_t (*estimate_needs_workspace_bytes)(const NeedParams&);
  void (*estimate_needs)(const NeedParams&, Stream);
  void (*select_blocks)(const SelectParams&, Stream);
  int64_t (*block_sparse_attention_workspace_bytes)(const AttentionParams&);
  void (*block_sparse_attention)(const AttentionParams&, Stream);
  int64_t (*choose_blocks_workspace_bytes)(const PipelineParams&);
  void (*choose_blocks)(const PipelineParams&, Stream);
  int64_t (*proxy_attention_workspace_bytes)(const PipelineParams&);
  void (*proxy_attention)(const PipelineParams&, Stream);
};

using Launch = std::function<void()>;
using Facts = std::vector<std::pair<std::string, std::string>>;

// What the device's own sensors say while it works.
struct Sensors {
  double sm_clock_mhz;
  double power_watts;
};

class Machine {
 public:
  virtual ~Machine() = default;

  virtual const char* name() const = 0;  // "cpu" or "cuda"
  virtual Facts facts() const = 0;       // device, driver, clocks: the head of every output
  virtual const Stages& stages() const = 0;
  virtual Stream stream() const = 0;

  // Memory is filled with 0xFF bytes, NaN in every type, so that what a kernel forgets to write
  // fails its check.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* memory) = 0;
  virtual void upload(void* to, const void* from, int64_t bytes) = 0;
  virtual void download(void* to, const void* from, int64_t bytes) = 0;
  // Independent standard normal values, the same for the same seed.
  virtual void fill_normal(void* to, int64_t count, DType dtype, uint64_t seed) = 0;

  virtual void synchronize() = 0;
  // Seconds that `count` launches take; `cold` empties the last-level cache first.
  virtual double time(const Launch& launch, int64_t count, bool cold) = 0;
  // The same work as one CUDA graph.
  virtual Launch as_graph(const Launch& launch) = 0;
  // Means since the last call; nothing where there are no sensors.
  virtual std::optional<Sensors> take_sensors() = 0;
};

std::unique_ptr<Machine> make_cpu_machine();
// Throws InvalidArgument in a build without CUDA.
std::unique_ptr<Machine> make_cuda_machine();

// Memory of a machine, freed with the object.
class Buffer {
 public:
  Buffer(Machine& machine, int64_t bytes)
      : machine_(machine), bytes_(bytes), data_(bytes == 0 ? nullptr : machine.allocate(bytes)) {}
  ~Buffer() {
    if (data_ != nullptr) machine_.release(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Machine& machine_;
  int64_t bytes_;
  void* data_;
};

// `count` elements at `from`, copied to the host.
template <typename T>
std::vector<T> download(Machine& machine, const T* from, int64_t count) {
  std::vector<T> values(static_cast<std::size_t>(count));
  machine.download(values.data(), from, count * static_cast<int64_t>(sizeof(T)));
  return values;
}

}  // namespace proxyattn::bench
