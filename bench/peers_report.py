"""Output of the comparison: a table to read, and JSON lines that compare.py understands."""

import json
from dataclasses import dataclass
from pathlib import Path

from peers_timing import Timing

NAME_WIDTH = 32


@dataclass
class Result:
    """One competitor's row of a case."""

    who: str
    status: str = "ok"  # or "wrong", "failed", "skipped"
    reason: str = ""
    timing: Timing | None = None
    flops: float = 0.0
    error: float | None = None  # relative L2 distance from exact attention
    note: str = ""

    def tflops(self) -> float:
        return self.flops / self.timing.median_ms / 1e9


class Report:
    def __init__(self, path: str | None):
        self._path = Path(path) if path else None
        self.num_bad = 0
        if self._path:
            self._path.write_text("")

    def _write(self, entry: dict) -> None:
        """Appends at once, so that a run that dies leaves what it has."""
        if self._path:
            with self._path.open("a") as file:
                print(json.dumps(entry), file=file)

    def header(self, facts: dict[str, str]) -> None:
        for key, value in facts.items():
            print(f"# {key}: {value}")
        print(
            "# columns: median ms, spread (interquartile range), TFLOPS of executed work, time "
            "over the first row's, distance from exact attention, SM clock, power\n"
        )
        self._write({"type": "header", "bench": "peers", **facts})

    def section(self, name: str) -> None:
        print(f"== {name}", flush=True)

    def skipped(self, section: str, case: dict, reason: str) -> None:
        print(f"{describe(case)}: skipped, {reason}", flush=True)
        self._write(case_entry(section, case, Result("all", "skipped", reason)))

    def case(self, section: str, case: dict, results: list[Result]) -> None:
        print(describe(case))
        timed = [r for r in results if r.status == "ok"]
        for result in results:
            print("  " + table_row(result, timed[0] if timed else None), flush=True)
            self._write(case_entry(section, case, result))
            ours_failed = result.status == "failed" and result.who.startswith("proxyattn")
            self.num_bad += result.status == "wrong" or ours_failed
        print(flush=True)


def describe(case: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in case.items())


def table_row(result: Result, first: Result | None) -> str:
    name = f"{result.who:<{NAME_WIDTH}}"
    if result.status != "ok":
        return f"{name} {result.status}: {result.reason}"
    timing = result.timing
    clock, power = timing.sensor_means()
    cells = [
        f"{timing.median_ms:10.4f} ms",
        f"{100 * timing.spread:5.1f}%",
        f"{result.tflops():7.1f}" if result.flops else " " * 7,
        f"{timing.median_ms / first.timing.median_ms:7.2f}x",
        f"{result.error:8.1e}" if result.error is not None else " " * 8,
        f"{clock:5.0f} MHz {power:4.0f} W" if clock else "",
        result.note,
    ]
    return " ".join([name, *cells]).rstrip()


def case_entry(section: str, case: dict, result: Result) -> dict:
    texts = {key: str(value) for key, value in case.items()}
    entry = {
        "type": "case",
        "bench": f"peers.{section}",
        "case": {**texts, "who": result.who},
        "status": result.status,
    }
    if result.status != "ok":
        return {**entry, "reason": result.reason}
    clock, power = result.timing.sensor_means()
    return {
        **entry,
        "median_ms": result.timing.median_ms,
        "spread": result.timing.spread,
        "samples": len(result.timing.samples),
        "tflops": result.tflops(),
        "error": result.error,
        "sm_clock_mhz": clock,
        "power_w": power,
        "note": result.note,
    }
