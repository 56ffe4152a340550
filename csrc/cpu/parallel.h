// Threads of the CPU kernels. A region starts its own and joins them at its end, so nothing
// outlives a call and a process may fork between calls.
#pragma once

#include <cstdint>
#include <functional>

namespace proxyattn::cpu {

// Threads worth starting for a region of `work` multiply-adds, at most num_threads(), at least 1.
int num_workers(double work);

// Calls body(task, worker) once for every task in [0, num_tasks), on `workers` threads of which
// the caller is one. Idle workers take the next task in order, so expensive ones belong first;
// worker in [0, workers) tells whose scratch to use. The first exception stops the region and is
// thrown to the caller.
void parallel_for(int64_t num_tasks,
                  int workers,
                  const std::function<void(int64_t task, int worker)>& body);

}  // namespace proxyattn::cpu
