// The CPU as a machine to benchmark on.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <new>
#include <unistd.h>

#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "common/half.h"
#include "machine.h"
#include "random.h"

namespace proxyattn::bench {
namespace {

constexpr std::size_t kAlignment = 64;                     // a cache line
constexpr int64_t kUnknownCacheBytes = int64_t{32} << 20;  // where the system doesn't say

const Stages kCpuStages = {
    [](const PoolParams& p, Stream) { cpu::pool_heads(p); },
    cpu::score_blocks_workspace_bytes,
    [](const ScoreParams& p, Stream) { cpu::score_blocks(p); },
    cpu::estimate_needs_workspace_bytes,
    [](const NeedParams& p, Stream) { cpu::estimate_needs(p); },
    [](const SelectParams& p, Stream) { cpu::select_blocks(p); },
    cpu::block_sparse_attention_workspace_bytes,
    [](const AttentionParams& p, Stream) { cpu::block_sparse_attention(p); },
    cpu::choose_blocks_workspace_bytes,
    [](const PipelineParams& p, Stream) { cpu::choose_blocks(p); },
    cpu::proxy_attention_workspace_bytes,
    [](const PipelineParams& p, Stream) { cpu::proxy_attention(p); },
};

int64_t last_level_cache_bytes() {
  const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return bytes > 0 ? bytes : kUnknownCacheBytes;
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

std::string kernel_families() {
  std::string families;
  for (const KernelConfig& config : cpu::supported_configs()) {
    const std::string family = config.family;
    if (families.find(family) != std::string::npos) continue;
    families += (families.empty() ? "" : ", ") + family;
  }
  return families;
}

template <typename T>
void fill(void* to, int64_t count, uint64_t seed) {
  for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = from_float<T>(normal_at(seed, i));
}

class CpuMachine : public Machine {
 public:
  const char* name() const override { return "cpu"; }
  const Stages& stages() const override { return kCpuStages; }
  Stream stream() const override { return nullptr; }

  Facts facts() const override {
    return {{"device", processor_name()},
            {"threads", std::to_string(cpu::num_threads())},
            {"families", kernel_families()}};
  }

  void* allocate(int64_t bytes) override {
    const auto size = static_cast<std::size_t>(bytes);
    return std::memset(::operator new(size, std::align_val_t{kAlignment}), 0xff, size);
  }
  void release(void* memory) override { ::operator delete(memory, std::align_val_t{kAlignment}); }
  void upload(void* to, const void* from, int64_t bytes) override {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
  void download(void* to, const void* from, int64_t bytes) override { upload(to, from, bytes); }

  void fill_normal(void* to, int64_t count, DType dtype, uint64_t seed) override {
    if (dtype == DType::kBFloat16) return fill<BFloat16>(to, count, seed);
    if (dtype == DType::kFloat16) return fill<Float16>(to, count, seed);
    fill<float>(to, count, seed);
  }

  void synchronize() override {}

  double time(const Launch& launch, int64_t count, bool cold) override {
    if (cold) flush();
    const auto begin = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < count; ++i) launch();
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin;
    return elapsed.count();
  }

  Launch as_graph(const Launch&) override {
    throw InvalidArgument("bench: --graph must be used with --device cuda");
  }
  std::optional<Sensors> take_sensors() override { return std::nullopt; }

 private:
  // Writing a whole cache's worth of lines pushes the inputs out.
  void flush() {
    if (cache_.empty()) cache_.resize(static_cast<std::size_t>(last_level_cache_bytes()));
    std::fill(cache_.begin(), cache_.end(), ++flush_value_);
  }

  std::vector<unsigned char> cache_;
  unsigned char flush_value_ = 0;
};

}  // namespace

std::unique_ptr<Machine> make_cpu_machine() {
  return std::make_unique<CpuMachine>();
}

#ifndef PROXYATTN_BENCH_CUDA
std::unique_ptr<Machine> make_cuda_machine() {
  throw InvalidArgument("bench: --device must be cpu in a build without CUDA, got cuda");
}
#endif

}  // namespace proxyattn::bench
