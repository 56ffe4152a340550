#include "cpu/parallel.h"

#include <atomic>
#include <cstdlib>
#include <exception>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "proxyattn/device.h"

#include "common/math.h"

namespace proxyattn::cpu {
namespace {

// Starting and joining a thread takes about 20 us, in which a core does about this many
// multiply-adds; a worker should have several times as much to do.
constexpr double kMinWorkPerWorker = 2e6;
constexpr int kMaxThreads = 1024;

int default_num_threads() {
  if (const char* text = std::getenv("PROXYATTN_NUM_THREADS")) {
    const long count = std::strtol(text, nullptr, 10);
    if (count >= 1) return static_cast<int>(min_of<long>(count, kMaxThreads));
  }
#ifdef __linux__
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return CPU_COUNT(&cores);
#endif
  return max_of(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Per calling thread, as OpenMP's and so torch's setting is: concurrent callers don't disturb each
// other between asking for a workspace and using it.
int& thread_count() {
  thread_local int count = default_num_threads();
  return count;
}

// The tasks of one region and the first exception that one of them threw.
class Region {
 public:
  Region(int64_t num_tasks, const std::function<void(int64_t, int)>& body)
      : num_tasks_(num_tasks), body_(body) {}

  void work(int worker) noexcept {
    try {
      for (int64_t task = next_++; task < num_tasks_; task = next_++) body_(task, worker);
    } catch (...) {
      next_ = num_tasks_;
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t num_tasks_;
  const std::function<void(int64_t, int)>& body_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace

int num_threads() {
  return thread_count();
}

void set_num_threads(int count) {
  thread_count() = min_of(max_of(1, count), kMaxThreads);
}

int num_workers(double work) {
  const double worthwhile = work / kMinWorkPerWorker;
  const int threads = num_threads();
  return worthwhile >= threads ? threads : max_of(1, static_cast<int>(worthwhile));
}

void parallel_for(int64_t num_tasks,
                  int workers,
                  const std::function<void(int64_t task, int worker)>& body) {
  workers = static_cast<int>(min_of<int64_t>(workers, num_tasks));
  Region region(num_tasks, body);
  std::vector<std::thread> threads;
  for (int worker = 1; worker < workers; ++worker) {
    try {
      threads.emplace_back(&Region::work, &region, worker);
    } catch (const std::exception&) {
      break;  // no more threads or memory to be had: those that run do the work
    }
  }
  region.work(0);
  for (std::thread& thread : threads) thread.join();
  region.rethrow();
}

}  // namespace proxyattn::cpu
