"""Timing of competitors side by side, with the clock and the power of the GPU."""

import ctypes
import math
import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]

SAMPLE_SECONDS = 20e-3  # short calls are timed several at once
MIN_ROUNDS = 3
MAX_CALLS = 200
QUEUEING_CYCLES = 60_000  # 30 us at 2 GHz: more than the host takes for one call


@dataclass
class Timing:
    """Samples of one competitor, in milliseconds per call."""

    samples: list[float] = field(default_factory=list)
    sensors: list[tuple[float, float]] = field(default_factory=list)
    failure: str = ""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / self.median_ms

    def sensor_means(self) -> tuple[float, float]:
        """SM clock in MHz and power in W; zeros if nothing was read."""
        if not self.sensors:
            return 0.0, 0.0
        clocks, watts = zip(*self.sensors, strict=True)
        return statistics.fmean(clocks), statistics.fmean(watts)


class Sensors:
    """Reads the SM clock and the power of a GPU in the background, through the driver's library.

    The power is the driver's average over about a second, so it belongs to a whole case rather
    than to one competitor of it.
    """

    INTERVAL = 0.02

    def __init__(self, device: torch.device):
        self.readings: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if device.type == "cuda" and self._open(device):
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()

    @property
    def available(self) -> bool:
        return self._thread is not None

    def _open(self, device: torch.device) -> bool:
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        except (OSError, AttributeError):
            return False
        self._gpu = ctypes.c_void_p()
        if self._nvml.nvmlInit_v2() != 0:
            return False
        return self._nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._gpu)) == 0

    def _poll(self) -> None:
        clock, milliwatts = ctypes.c_uint(), ctypes.c_uint()
        sm_clock = 1
        while not self._stop.wait(self.INTERVAL):
            now = time.perf_counter()
            failed = self._nvml.nvmlDeviceGetClockInfo(self._gpu, sm_clock, ctypes.byref(clock))
            failed |= self._nvml.nvmlDeviceGetPowerUsage(self._gpu, ctypes.byref(milliwatts))
            if not failed:
                self.readings.append((now, float(clock.value), milliwatts.value / 1e3))

    def between(self, begin: float, end: float) -> list[tuple[float, float]]:
        return [(mhz, watts) for when, mhz, watts in self.readings if begin <= when <= end]

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


class Stopwatch:
    """Times calls by CUDA events, or by the wall clock on a CPU."""

    def __init__(self, device: torch.device, max_rounds: int, hold: float = 0.0):
        self.device = device
        self.max_rounds = max_rounds
        self.hold = hold
        self.sensors = Sensors(device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Call, count: int = 1, lead: int = 0) -> float:
        """Mean of ``count`` calls in a row, behind ``lead`` that are not timed."""
        for _ in range(lead):
            call()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            for _ in range(count):
                call()
            return 1e3 * (time.perf_counter() - begin) / count
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if count > 1 and lead == 0:
            # Keeps the device busy until all calls are queued, so that no host time is measured.
            torch.cuda._sleep(count * QUEUEING_CYCLES)
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def race(self, calls: dict[str, Call], seconds: float) -> dict[str, Timing]:
        """Times the calls round by round, so that all meet the same temperatures.

        Each round has an order of its own: a GPU at its power limit runs slower behind a call that
        drew much than behind one that drew little, and a fixed order would give every call the same
        neighbour. With ``hold`` a call first runs for that many seconds, so that clock and power
        have become its own when it is timed.

        Runs for about ``seconds``, but at least three rounds and at most ``max_rounds``. A call
        that raises is left out of the rounds after and its ``failure`` is set.
        """
        timings = {name: Timing() for name in calls}
        counts: dict[str, int] = {}
        leads: dict[str, int] = {}
        begin = time.perf_counter()
        for name, call in calls.items():
            try:
                call()
                once = max(self.milliseconds(call), 1e-3) / 1e3
                counts[name] = min(MAX_CALLS, max(1, round(SAMPLE_SECONDS / once)))
                leads[name] = math.ceil(self.hold / once)
            except Exception as error:
                timings[name].failure = reason_of(error)
        for round_idx in range(self.max_rounds):
            if round_idx >= MIN_ROUNDS and time.perf_counter() - begin > seconds:
                break
            running = [name for name in calls if not timings[name].failure]
            for name in random.Random(round_idx).sample(running, len(running)):
                self._sample(timings[name], calls[name], counts[name], leads[name])
        return timings

    def _sample(self, timing: Timing, call: Call, count: int, lead: int) -> None:
        begin = time.perf_counter()
        try:
            timing.samples.append(self.milliseconds(call, count, lead))
        except Exception as error:
            timing.failure = reason_of(error)
        timing.sensors += self.sensors.between(begin, time.perf_counter())


def reason_of(error: BaseException) -> str:
    """One line that says why, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200].rstrip(": ")


def as_graph(call: Call) -> Call:
    """The call as one CUDA graph; its result is that of the capture, renewed by every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay():
        graph.replay()
        return result

    return replay
