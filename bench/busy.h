// Keeping the device busy while the host queues work behind it.
#pragma once

#include <cstdint>

#include "proxyattn/types.h"

namespace proxyattn::bench {

// Queues a kernel that does nothing for a number of clock cycles. Launches queued in the meantime
// run back to back afterwards, so that the time between two events holds no host time.
void keep_busy(int64_t cycles, Stream stream);

}  // namespace proxyattn::bench
