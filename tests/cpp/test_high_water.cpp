// Settings that only grow: asked for once per device and size, and never lowered by a race.
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/common/high_water.h"

namespace proxyattn::cuda {
namespace {

TEST(raised_only_by_more_than_before) {
  HighWater mark;
  std::vector<int> raised;
  const auto reach = [&](int device, int size) {
    mark.reach(device, size, [&] { raised.push_back(size); });
  };
  for (const int size : {50, 50, 40, 60, 50}) reach(0, size);
  CHECK(raised == std::vector<int>({50, 60}));
  reach(100, 55);  // another device, of any number
  reach(100, 55);
  reach(3, 1);
  CHECK(raised == std::vector<int>({50, 60, 55, 1}));
}

TEST(a_failure_is_tried_again) {
  HighWater mark;
  CHECK_THROWS(std::runtime_error, "refused",
               mark.reach(0, 50, [] { throw std::runtime_error("refused"); }));
  int setting = 0;
  mark.reach(0, 50, [&] { setting = 50; });
  CHECK_EQ(setting, 50);
}

TEST(two_first_calls_at_a_time_leave_the_larger_size) {
  HighWater mark;
  std::atomic<bool> begun{false};
  std::atomic<int> setting{0};
  std::thread smaller([&] {
    mark.reach(0, 50, [&] {
      begun = true;
      // Time in which the other thread would get past, if it could.
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      setting = 50;
    });
  });
  while (!begun) std::this_thread::yield();
  mark.reach(0, 60, [&] { setting = 60; });
  smaller.join();
  CHECK_EQ(setting, 60);
}

}  // namespace
}  // namespace proxyattn::cuda

int main() {
  return proxyattn::test::run_all();
}
