// Runs a check on every instruction family and on several numbers of threads: all of a family must
// give the same bits whatever the number.
#pragma once

#include "proxyattn/device.h"

#include "cpu/simd/kernels.h"

namespace proxyattn::test {

// Calls check() once per family of this processor, which the CPU stages then use.
template <typename Check>
void for_each_family(const Check& check) {
  const cpu::Kernels& usual = cpu::kernels();
  for (const cpu::Kernels* family : cpu::supported_kernels()) {
    cpu::use_kernels(*family);
    check();
  }
  cpu::use_kernels(usual);
}

// Calls check() with 1, 2 and 5 threads.
template <typename Check>
void for_some_thread_counts(const Check& check) {
  const int usual = cpu::num_threads();
  for (const int count : {1, 2, 5}) {
    cpu::set_num_threads(count);
    check();
  }
  cpu::set_num_threads(usual);
}

}  // namespace proxyattn::test
