"""Times proxyattn beside torch's attention, flex_attention and FlashAttention-4.

All run in one process on the same random inputs, round by round, each checked against exact
attention first. A competitor that is missing or fails says why and is left out. Sections:

  dense     all blocks: against FlashAttention-2 and cuDNN of torch, and FlashAttention-4
  sparse    random block lists of each head: against FlashAttention-4 and flex_attention
  select    the same with lists as select_blocks makes them: nested prefixes of shared rankings
  estimate  the stages before attention, one by one and together as a CUDA graph
  end2end   proxy_attention reading a tenth of the blocks or less, against dense attention
  serving   the same over 32 sequences of 1K to 64K tokens in one call, packed and paged, and one
            by one; against FlashAttention-4 over the same pack
  chunks    the last queries of a prompt beside all of it; against FlashAttention-4, dense
  windows   sliding windows, and the blocks that they touch as lists; against FlashAttention-4

Dense rows count N * N / 2 pairs, sparse rows whole executed blocks. Exits with 1 if a result was
wrong or proxyattn failed.
"""

import argparse
import gc
import platform
import sys
import time
from functools import partial

import peers_sections
import proxyattn
import torch
from peers import Entry, competitors
from peers_inputs import TOLERANCE
from peers_report import Report, Result
from peers_timing import Stopwatch, reason_of

#: Measuring time of each section in seconds; the sum stays under 8 minutes with compilations.
SECTION_SECONDS = {
    "dense": 60,
    "sparse": 130,
    "select": 70,
    "estimate": 50,
    "end2end": 90,
    "serving": 60,
    "chunks": 40,
    "windows": 30,
}
CEILING_SIZE = 8192


class Bench:
    """What the sections share: options, clock, report, and how a case is run."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            args.dtype
        ]
        self.stopwatch = Stopwatch(self.device, args.rounds, args.hold)
        self.report = Report(args.json)

    def run_section(self, name: str) -> None:
        """Runs its cases until its time is spent; what doesn't get its turn is named."""
        seconds = self.args.time_limit or SECTION_SECONDS[name]
        deadline = time.perf_counter() + seconds
        self.report.section(name)
        self.ceiling(name)
        cases = peers_sections.SECTIONS[name](self.args)
        for done, (case, make_entries) in enumerate(cases):
            left = deadline - time.perf_counter()
            if left <= 0:
                self.report.skipped(name, case, f"the section's {seconds} s are over")
                continue
            try:
                entries = make_entries(self)
            except Exception as error:
                self.report.case(name, case, [Result("inputs", "failed", reason_of(error))])
            else:
                self.run_case(name, case, entries, left / (len(cases) - done))
                del entries
            self.release()

    def run_case(self, section: str, case: dict, entries: dict[str, Entry], seconds: float) -> None:
        begin = time.perf_counter()
        results, calls = {}, {}
        for who, entry in entries.items():
            if who in self.args.without:
                continue
            results[who] = Result(who, flops=entry.flops, note=entry.note)
            try:
                call = entry.build()
                out = call()
                self.stopwatch.synchronize()
                if entry.exact is not None:
                    results[who].error = entry.exact.error(out)
                del out
            except Exception as error:
                results[who].status, results[who].reason = "failed", reason_of(error)
                continue
            if entry.exact is not None and not results[who].error <= TOLERANCE:
                results[who].status = "wrong"
                results[who].reason = f"off by {results[who].error:.2e} of its size"
                continue
            calls[who] = call
        spent = time.perf_counter() - begin
        timings = self.stopwatch.race(calls, max(0.0, seconds - spent))
        for who, timing in timings.items():
            results[who].timing = timing
            if timing.failure:
                results[who].status, results[who].reason = "failed", timing.failure
        self.report.case(section, case, list(results.values()))

    def ceiling(self, section: str) -> None:
        """A large matrix product: what the tensor cores give at the present temperature."""
        if self.device.type != "cuda":
            return
        size = CEILING_SIZE
        a, b = (torch.randn(size, size, dtype=self.dtype, device=self.device) for _ in range(2))
        entry = Entry(build=lambda: lambda: a @ b, flops=2.0 * size**3)
        self.run_case(section, {"product": size}, {"torch matmul": entry}, seconds=1.0)
        self.release()

    def release(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def facts(self) -> dict[str, str]:
        facts = {
            "device": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "proxyattn": proxyattn.__version__,
            "dtype": self.args.dtype,
            "command": " ".join(sys.argv[1:]),
        }
        if self.device.type == "cuda":
            facts["device"] = torch.cuda.get_device_name(self.device)
            facts["cuda"] = str(torch.version.cuda)
            facts["cudnn"] = str(torch.backends.cudnn.version())
            facts["sensors"] = "nvml" if self.stopwatch.sensors.available else "none"
        return facts


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def integers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[float]:
        return [float(part) for part in text.split(",")]

    def head_shapes(count: int, text: str) -> list[tuple[int, ...]]:
        shapes = [tuple(int(n) for n in part.split("/")) for part in text.split(",")]
        if any(len(shape) != count for shape in shapes):
            raise argparse.ArgumentTypeError(f"needs {count} numbers with / between, got {text}")
        return shapes

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    add("--sections", default=",".join(SECTION_SECONDS), help="comma-separated")
    add("--time-limit", type=float, help="seconds for each section, instead of its own")
    add("--rounds", type=int, default=40, help="at most this many for a case")
    add(
        "--hold",
        type=float,
        default=0.0,
        help="seconds that a call runs before it is timed, so that clock and power are its own; "
        "else all share what a round of short turns leaves them",
    )
    add(
        "--without", type=names, default=[], help="competitors to leave out, such as flex_attention"
    )
    add("--json", metavar="FILE", help="write JSON lines, for compare.py")
    add("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    add("--lengths", type=integers, help="tokens, instead of each section's own")
    add("--heads", type=partial(head_shapes, 2), help="query/kv heads, such as 32/8,28/4")
    add(
        "--proxies",
        type=partial(head_shapes, 3),
        help="query/kv/proxy heads of estimate, such as 32/8/1",
    )
    add("--head-dim", type=int, default=128 if cuda else 64)
    add("--block-sizes", type=integers, default=[128, 64])
    add("--densities", type=numbers, default=[1.0, 0.2, 0.05])
    add("--read", type=float, help="share of the blocks that end2end reads, instead of its own")
    add("--stride", type=int, default=4)
    args = parser.parse_args(argv)
    args.sections = args.sections.split(",")
    unknown = set(args.sections) - set(SECTION_SECONDS)
    if unknown:
        parser.error(f"--sections must be of {', '.join(SECTION_SECONDS)}, got {sorted(unknown)}")
    if args.device == "cuda" and not cuda:
        parser.error("--device must be cpu where torch finds no GPU, got cuda")
    if not 0.0 <= args.hold < float("inf"):
        parser.error(f"--hold must be finite and at least 0, got {args.hold}")
    peers = competitors(torch.device(args.device))
    unknown = set(args.without) - peers
    if unknown:
        parser.error(f"--without must be of {', '.join(sorted(peers))}, got {sorted(unknown)}")
    small = args.device == "cpu"
    args.heads = args.heads or ([(4, 2)] if small else [(32, 8)])
    args.proxies = args.proxies or ([(4, 2, 1)] if small else [(32, 8, 1), (32, 8, 8), (28, 4, 4)])
    return args


def main(argv: list[str] | None = None) -> int:
    bench = Bench(parse_args(argv))
    bench.report.header(bench.facts())
    try:
        with torch.no_grad():
            for name in bench.args.sections:
                bench.run_section(name)
    finally:
        bench.stopwatch.sensors.close()
    return 1 if bench.report.num_bad else 0


if __name__ == "__main__":
    sys.exit(main())
