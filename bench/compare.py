"""Compares two runs of a benchmark: compare.py old.json new.json

Reads the JSON lines of the C++ benchmarks (``--json``) or of compare_peers.py and prints a table.
Exits with 1 if any case is over 3 % slower or no longer runs, with 2 if there is nothing to
compare.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

#: Header entries that must agree for times to mean the same.
SAME_MACHINE = ("device", "driver", "cache", "launch", "threads")


class Run:
    """One file: its header, the median time of each case, and the cases that did not run."""

    def __init__(self, path: str):
        self.header: dict[str, str] = {}
        times: dict[str, list[float]] = {}
        self.broken: dict[str, str] = {}
        for line in Path(path).read_text().splitlines():
            if not line.startswith("{"):
                continue
            entry = json.loads(line)
            if entry["type"] == "header":
                self.header.update(entry)
            elif entry["type"] == "case":
                name = case_name(entry)
                if entry["status"] == "ok":
                    times.setdefault(name, []).append(entry["median_ms"])
                elif entry["status"] != "skipped":
                    self.broken[name] = f"{entry['status']}: {entry.get('reason', '')}"
        # A case that was run several times counts by the middle one.
        self.times = {name: statistics.median(values) for name, values in times.items()}


def case_name(entry: dict) -> str:
    return " ".join([entry["bench"], *(f"{k}={v}" for k, v in entry["case"].items())])


def verdict(old_ms: float, new_ms: float, tolerance: float) -> str:
    if new_ms > old_ms * (1 + tolerance):
        return "SLOWER"
    return "faster" if new_ms < old_ms * (1 - tolerance) else ""


def compare(old: Run, new: Run, tolerance: float) -> int:
    """Prints the table; returns the exit status."""
    for key in SAME_MACHINE:
        if old.header.get(key) != new.header.get(key):
            print(f"note: {key} differs: {old.header.get(key)} and {new.header.get(key)}")
    names = [name for name in old.times if name in new.times]
    broken = [name for name in old.times if name in new.broken and name not in new.times]
    width = max((len(name) for name in [*names, *broken]), default=0)
    print(f"{'case':<{width}} {'old ms':>10} {'new ms':>10} {'change':>8}")
    num_slower = 0
    for name in names:
        before, after = old.times[name], new.times[name]
        word = verdict(before, after, tolerance)
        num_slower += word == "SLOWER"
        change = f"{100 * (after / before - 1):+.1f}%"
        print(f"{name:<{width}} {before:>10.4f} {after:>10.4f} {change:>8} {word}".rstrip())
    for name in broken:
        print(f"{name:<{width}} {old.times[name]:>10.4f} {new.broken[name]}")
    missing = len(old.times) - len(names) - len(broken)
    print(
        f"{len(names)} cases compared, {num_slower} over {100 * tolerance:g} % slower, "
        f"{len(broken)} no longer run, {missing} not in the new file"
    )
    if num_slower or broken:
        return 1
    return 0 if names else 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", help="JSON lines of the run to compare with")
    parser.add_argument("new", help="JSON lines of the run to judge")
    parser.add_argument("--tolerance", type=float, default=0.03, help="share (0.03)")
    args = parser.parse_args()
    return compare(Run(args.old), Run(args.new), args.tolerance)


if __name__ == "__main__":
    sys.exit(main())
