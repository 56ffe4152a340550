// A CUDA device as a machine to benchmark on.
#include <string>

#include <cuda_runtime_api.h>

#include "proxyattn/device.h"
#include "proxyattn/error.h"

#include "busy.h"
#include "cuda/common/check.h"
#include "machine.h"
#include "nvml.h"
#include "random.h"

namespace proxyattn::bench {
namespace {

constexpr const char* kOp = "bench";
constexpr int64_t kQueueingCycles = 20'000;  // 10 us at 2 GHz: more than the host takes to launch

const Stages kCudaStages = {
    cuda::pool_heads,
    cuda::score_blocks_workspace_bytes,
    cuda::score_blocks,
    cuda::estimate_needs_workspace_bytes,
    cuda::estimate_needs,
    cuda::select_blocks,
    cuda::block_sparse_attention_workspace_bytes,
    cuda::block_sparse_attention,
    cuda::choose_blocks_workspace_bytes,
    cuda::choose_blocks,
    cuda::proxy_attention_workspace_bytes,
    cuda::proxy_attention,
};

int attribute(cudaDeviceAttr which) {
  int value = 0;
  PROXYATTN_CUDA_CALL(kOp, cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::unique_ptr<Nvml> open_sensors() {
  char pci_bus_id[32] = "";
  PROXYATTN_CUDA_CALL(kOp, cudaDeviceGetPCIBusId(pci_bus_id, sizeof(pci_bus_id), 0));
  return Nvml::open(pci_bus_id);
}

// Owns a captured graph, so that the launch made of it can be copied.
struct Graph {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ~Graph() {
    if (exec != nullptr) cudaGraphExecDestroy(exec);
    if (graph != nullptr) cudaGraphDestroy(graph);
  }
};

class CudaMachine : public Machine {
 public:
  CudaMachine() {
    PROXYATTN_CUDA_CALL(kOp, cudaSetDevice(0));
    PROXYATTN_CUDA_CALL(kOp, cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
    PROXYATTN_CUDA_CALL(kOp, cudaEventCreate(&begin_));
    PROXYATTN_CUDA_CALL(kOp, cudaEventCreate(&end_));
    cache_bytes_ = attribute(cudaDevAttrL2CacheSize);
    PROXYATTN_CUDA_CALL(kOp, cudaMalloc(&cache_, static_cast<std::size_t>(cache_bytes_)));
    sensors_ = open_sensors();
  }
  ~CudaMachine() override {
    cudaFree(cache_);
    cudaEventDestroy(end_);
    cudaEventDestroy(begin_);
    cudaStreamDestroy(stream_);
  }

  const char* name() const override { return "cuda"; }
  const Stages& stages() const override { return kCudaStages; }
  Stream stream() const override { return stream_; }
  Facts facts() const override;

  void* allocate(int64_t bytes) override {
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, static_cast<std::size_t>(bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // the next launch must not report this error as its own
      throw CudaError(
          join_message(kOp, ": cudaMalloc of ", bytes, " bytes failed: ", cudaGetErrorName(error)));
    }
    PROXYATTN_CUDA_CALL(kOp,
                        cudaMemsetAsync(memory, 0xff, static_cast<std::size_t>(bytes), stream_));
    return memory;
  }
  void release(void* memory) override { cudaFree(memory); }

  void upload(void* to, const void* from, int64_t bytes) override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
  }
  void download(void* to, const void* from, int64_t bytes) override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
  }
  void fill_normal(void* to, int64_t count, DType dtype, uint64_t seed) override {
    fill_normal_on_device(to, count, dtype, seed, stream_);
  }
  void synchronize() override { PROXYATTN_CUDA_CALL(kOp, cudaStreamSynchronize(stream_)); }

  double time(const Launch& launch, int64_t count, bool cold) override;
  Launch as_graph(const Launch& launch) override;
  std::optional<Sensors> take_sensors() override;

 private:
  void copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
    if (bytes == 0) return;
    PROXYATTN_CUDA_CALL(kOp,
                        cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream_));
    synchronize();
  }
  void flush() {
    const auto bytes = static_cast<std::size_t>(cache_bytes_);
    PROXYATTN_CUDA_CALL(kOp, cudaMemsetAsync(cache_, ++flush_value_ & 0xff, bytes, stream_));
  }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  void* cache_ = nullptr;
  int64_t cache_bytes_ = 0;
  int flush_value_ = 0;
  std::unique_ptr<Nvml> sensors_;
  Sensors sum_{0, 0};
  int num_readings_ = 0;
};

Facts CudaMachine::facts() const {
  cudaDeviceProp properties{};
  PROXYATTN_CUDA_CALL(kOp, cudaGetDeviceProperties(&properties, 0));
  int driver = 0;
  PROXYATTN_CUDA_CALL(kOp, cudaDriverGetVersion(&driver));
  Facts facts = {
      {"device", properties.name},
      {"capability", std::to_string(properties.major) + "." + std::to_string(properties.minor)},
      {"sms", std::to_string(properties.multiProcessorCount)},
      {"l2_bytes", std::to_string(cache_bytes_)},
      {"max_sm_clock_mhz", std::to_string(attribute(cudaDevAttrClockRate) / 1000)},
      {"cuda_driver", version_text(driver)},
      {"cuda_runtime", version_text(cuda::runtime_version())},
      {"architectures", cuda::built_architectures()},
      {"cuda_compiler", cuda_compiler()}};
  if (sensors_ == nullptr) {
    facts.emplace_back("sensors", "none");
  } else {
    facts.emplace_back("driver", sensors_->driver_version());
  }
  return facts;
}

double CudaMachine::time(const Launch& launch, int64_t count, bool cold) {
  if (cold) {
    flush();  // takes longer than queueing one launch
  } else if (count > 1) {
    keep_busy(count * kQueueingCycles, stream_);
  }
  PROXYATTN_CUDA_CALL(kOp, cudaEventRecord(begin_, stream_));
  for (int64_t i = 0; i < count; ++i) launch();
  PROXYATTN_CUDA_CALL(kOp, cudaEventRecord(end_, stream_));
  // Read while the work runs: an idle device shows other clocks.
  if (sensors_ != nullptr && cudaEventQuery(end_) == cudaErrorNotReady) {
    if (const std::optional<Sensors> now = sensors_->read()) {
      sum_ = {sum_.sm_clock_mhz + now->sm_clock_mhz, sum_.power_watts + now->power_watts};
      ++num_readings_;
    }
  }
  PROXYATTN_CUDA_CALL(kOp, cudaEventSynchronize(end_));
  cudaGetLastError();  // "not ready" above is no error
  float milliseconds = 0.0f;
  PROXYATTN_CUDA_CALL(kOp, cudaEventElapsedTime(&milliseconds, begin_, end_));
  return static_cast<double>(milliseconds) / 1000.0;
}

Launch CudaMachine::as_graph(const Launch& launch) {
  auto owner = std::make_shared<Graph>();
  PROXYATTN_CUDA_CALL(kOp, cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  launch();
  PROXYATTN_CUDA_CALL(kOp, cudaStreamEndCapture(stream_, &owner->graph));
  PROXYATTN_CUDA_CALL(kOp, cudaGraphInstantiate(&owner->exec, owner->graph, 0));
  return [owner, stream = stream_, keep_data = launch] {
    PROXYATTN_CUDA_CALL(kOp, cudaGraphLaunch(owner->exec, stream));
  };
}

std::optional<Sensors> CudaMachine::take_sensors() {
  if (num_readings_ == 0) return std::nullopt;
  const Sensors mean{sum_.sm_clock_mhz / num_readings_, sum_.power_watts / num_readings_};
  sum_ = {0, 0};
  num_readings_ = 0;
  return mean;
}

}  // namespace

std::unique_ptr<Machine> make_cuda_machine() {
  return std::make_unique<CudaMachine>();
}

}  // namespace proxyattn::bench
