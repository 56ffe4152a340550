// Parallel regions: every task once, exceptions, numbers of threads.
#include <atomic>
#include <cstdlib>
#include <functional>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "proxyattn/device.h"

#include "check.h"
#include "cpu/parallel.h"

namespace {

// Allocations that this thread may still make; less than none: any number.
thread_local int g_allocations_left = -1;

}  // namespace

void* operator new(std::size_t size) {
  void* memory = g_allocations_left == 0 ? nullptr : std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  if (g_allocations_left > 0) --g_allocations_left;
  return memory;
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}

namespace proxyattn::cpu {
namespace {

TEST(every_task_runs_once) {
  for (const int64_t num_tasks : {0, 1, 2, 7, 1000}) {
    for (const int workers : {1, 2, 3, 16}) {
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(num_tasks) + 1);
      std::atomic<bool> worker_in_range{true};
      parallel_for(num_tasks, workers, [&](int64_t task, int worker) {
        ++runs[static_cast<std::size_t>(task)];
        if (worker < 0 || worker >= workers) worker_in_range = false;
      });
      CHECK(worker_in_range);
      CHECK_EQ(runs.back(), 0);
      for (int64_t task = 0; task < num_tasks; ++task) {
        CHECK_EQ(runs[static_cast<std::size_t>(task)], 1);
      }
    }
  }
}

TEST(no_two_threads_are_the_same_worker) {
  std::vector<std::atomic<int>> busy(4);
  std::atomic<bool> alone{true};
  parallel_for(2000, 4, [&](int64_t, int worker) {
    if (++busy[static_cast<std::size_t>(worker)] != 1) alone = false;
    std::this_thread::yield();
    --busy[static_cast<std::size_t>(worker)];
  });
  CHECK(alone);
}

TEST(an_exception_reaches_the_caller) {
  for (const int workers : {1, 4}) {
    CHECK_THROWS(std::runtime_error, "task 5", parallel_for(100, workers, [](int64_t task, int) {
                   if (task == 5) throw std::runtime_error("task 5");
                 }));
    std::atomic<int> later{0};
    parallel_for(10, workers, [&](int64_t, int) { ++later; });
    CHECK_EQ(later, 10);
  }
}

TEST(without_memory_for_threads_the_caller_does_the_work) {
  std::atomic<int> runs{0};
  const std::function<void(int64_t, int)> count = [&](int64_t, int) { ++runs; };
  for (int allocations = 0; allocations < 12; ++allocations) {
    runs = 0;
    g_allocations_left = allocations;
    parallel_for(100, 4, count);
    g_allocations_left = -1;
    CHECK_EQ(runs, 100);
  }
}

TEST(threads_are_limited_by_the_setting_and_by_the_work) {
  const int usual = num_threads();
  CHECK(usual >= 1);
  set_num_threads(3);
  CHECK_EQ(num_threads(), 3);
  CHECK_EQ(num_workers(0.0), 1);
  CHECK_EQ(num_workers(1e15), 3);
  set_num_threads(0);
  CHECK_EQ(num_threads(), 1);
  set_num_threads(1000000);
  CHECK(num_threads() < 1000000);
  CHECK(num_workers(1e7) < 10);
  int elsewhere = 0;
  std::thread([&] { elsewhere = num_threads(); }).join();
  CHECK_EQ(elsewhere, usual);  // the setting belongs to a thread
  set_num_threads(usual);
}

}  // namespace
}  // namespace proxyattn::cpu

int main() {
  return proxyattn::test::run_all();
}
