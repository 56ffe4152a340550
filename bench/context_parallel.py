"""Times context parallel prefill of one layer on the GPUs of one host, beside one GPU.

    torchrun --standalone --nproc-per-node 2 bench/context_parallel.py

For every length, sparse attention that reads a given share of the causal blocks and dense
attention: ``proxy_attention`` on one GPU, ``context_parallel_attention`` on all, the gathers alone
and what comes before them; results are compared first. Beside the times stands what the model of
context_parallel_model.py says of them, with the bandwidth that was measured, and what it expects of
8 GPUs and of two hosts of 8. Exits with 1 if a result was wrong.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import proxyattn
import torch
import torch.distributed as dist
from context_parallel_model import Links, Problem
from peers_inputs import TOLERANCE, Shape, blocks_for_density, random_inputs
from proxyattn.distributed import context_parallel_attention, shard
from proxyattn.distributed.call import prepare
from proxyattn.distributed.gather import Gather

#: Share of the causal blocks that is read, by length.
READ = {131072: 0.1, 262144: 0.065, 1048576: 0.05}
#: With a gamma this small the least budget alone says how much is read.
ALMOST_NOTHING = 0.001
#: Lengths from here on are not run dense unless asked for: 14 s a call on one H200.
LONG = 1 << 20
SAMPLED_TOKENS = 256
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Clock:
    """Times what all ranks do at once: the slowest counts."""

    device: torch.device
    rounds: int

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], ranks: range | None = None) -> float:
        """The median, of the ranks that call; the others wait."""
        samples = []
        for _ in range(self.rounds + 1):  # the first warms up
            self.synchronize()
            dist.barrier()
            begin = time.perf_counter()
            if ranks is None or dist.get_rank() in ranks:
                call()
                self.synchronize()
            spent = torch.tensor(time.perf_counter() - begin, device=self.device)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            samples.append(spent.item())
        return statistics.median(samples[1:])


@dataclass
class Case:
    """One length, sparse or dense, and its inputs on this rank; rank 0 has the whole ones too."""

    args: argparse.Namespace
    device: torch.device
    shape: Shape
    read: float

    def __post_init__(self):
        self.inputs = random_inputs(self.shape, DTYPES[self.args.dtype], self.device)
        options = {"layout": self.args.layout, "block_size": self.args.block_size}
        tensors = (self.inputs.q, self.inputs.k, self.inputs.v)
        self.q, self.k, self.v = (shard(x, **options) for x in tensors)
        positions = torch.arange(self.shape.length, device=self.device)
        self.mine = shard(positions, 0, **options)
        if dist.get_rank() > 0:
            self.inputs = None

    @property
    def settings(self) -> dict:
        common = {"block_size": self.args.block_size}
        if self.read >= 1:
            return {"gamma": 1.0, **common}
        blocks = blocks_for_density(-(-self.shape.length // self.args.block_size), self.read)
        return {"gamma": ALMOST_NOTHING, "min_budget": blocks * self.args.block_size, **common}

    def one(self):
        return proxyattn.proxy_attention(
            self.inputs.q, self.inputs.k, self.inputs.v, **self.settings
        )

    def all(self):
        return context_parallel_attention(
            *(self.q, self.k, self.v),
            layout=self.args.layout,
            max_gather_bytes=self.args.max_gather_bytes,
            **self.settings,
        )

    def prepared(self):
        return prepare(
            *(self.q, self.k, self.v),
            layout=self.args.layout,
            max_gather_bytes=self.args.max_gather_bytes,
            settings=self.settings,
        )

    def pool_keys(self):
        proxyattn.pool_heads(self.inputs.q[:, :0], self.inputs.k)

    def error(self) -> float:
        """Relative L2 distance of sampled tokens from one GPU's, the worst of any rank."""
        positions = torch.linspace(
            0, self.shape.length - 1, SAMPLED_TOKENS, device=self.device
        ).long()
        shape = (1, len(positions), self.shape.q_heads, self.shape.head_dim)
        want = torch.empty(shape, dtype=self.q.dtype, device=self.device)
        if dist.get_rank() == 0:
            want.copy_(self.one()[:, positions])
        dist.broadcast(want, 0)
        places = torch.searchsorted(self.mine, positions)  # chunks of a rank are in order
        places = places.clamp(max=max(0, len(self.mine) - 1))
        held = self.mine[places] == positions
        got = self.all()[:, places[held]].double()
        distance = (got - want[:, held].double()).norm() / want[:, held].double().norm()
        worst = distance.nan_to_num(nan=float("inf")) if held.any() else distance.new_zeros(())
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        return worst.item()


def measure(case: Case, clock: Clock) -> dict:
    error = case.error()
    world = dist.get_world_size()
    first = range(1)
    call = case.prepared()
    gather = call.gather()
    groups = len(gather.groups)

    def all_gathers():
        gather.start(0)
        for i in range(groups):
            gather.start(i + 1)
            gather.wait(i)

    def before():
        estimate = case.prepared().estimate()
        if estimate is not None:
            estimate.shares(case.k)

    tiny = Gather(case.k[:, :1], case.v[:, :1], case.shape.kv_heads, 16, 16, call.group)

    def gather_nothing():
        tiny.start(0)
        tiny.wait(0)

    gathering, latency = clock.seconds(all_gathers), clock.seconds(gather_nothing)
    problem = Problem(
        kv_bytes=2.0
        * case.shape.length
        * case.shape.kv_heads
        * case.shape.head_dim
        * case.k.element_size(),
        groups=groups,
        one_gpu=clock.seconds(case.one, first),
        pooling=clock.seconds(case.pool_keys, first) if case.read < 1 else 0.0,
        before=clock.seconds(before),
    )
    arrived = problem.kv_bytes * (world - 1) / world
    carried = max(gathering - groups * latency, 1e-9)
    links = Links(arrived / carried if world > 1 else float("inf"), latency)
    return {
        "length": case.shape.length,
        "read": case.read,
        "world": world,
        "groups": groups,
        "error": error,
        "one_gpu_ms": 1e3 * problem.one_gpu,
        "all_ms": 1e3 * clock.seconds(case.all),
        "before_ms": 1e3 * problem.before,
        "pooling_ms": 1e3 * problem.pooling,
        "gather_ms": 1e3 * gathering,
        "gather_bytes": arrived,
        "gather_gb_s": links.bandwidth / 1e9,
        "hidden": problem.hidden(world, links),
        "model_ms": 1e3 * problem.seconds(world, links),
        **forecast(problem, links, case.args.host_gb_s * 1e9),
    }


def forecast(problem: Problem, links: Links, host_bandwidth: float) -> dict:
    """Speedups that the model expects elsewhere: links within a host as measured, between hosts as
    told, whichever is slower."""
    between = Links(min(links.bandwidth, host_bandwidth), links.latency)
    return {
        "expected_8_gpus": problem.speedup(8, links),
        "expected_2_hosts_of_8": problem.speedup(16, between),
    }


HEADER = (
    "length, read |  one GPU |  {world} ranks | speedup |   model |  before |  gather |   GB/s |"
    " hidden | 8 GPUs | 2 hosts | error"
)


def table_row(found: dict) -> str:
    read = "dense" if found["read"] >= 1 else f"{100 * found['read']:.1f} %"
    cells = [
        f"{found['length']:>7}, {read:>6}"[-14:],
        f"{found['one_gpu_ms']:8.2f}",
        f"{found['all_ms']:8.2f}",
        f"{found['one_gpu_ms'] / found['all_ms']:6.2f}x",
        f"{found['model_ms']:7.2f}",
        f"{found['before_ms']:7.2f}",
        f"{found['gather_ms']:7.2f}",
        f"{found['gather_gb_s']:6.1f}",
        f"{100 * found['hidden']:4.0f} %",
        f"{found['expected_8_gpus']:5.2f}x",
        f"{found['expected_2_hosts_of_8']:6.2f}x",
        f"{found['error']:.0e}",
    ]
    return " | ".join(cells)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    def integers(text):
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--lengths", type=integers, default=list(READ))
    parser.add_argument("--read", type=float, help="share of the blocks, instead of each length's")
    parser.add_argument("--heads", default="32/8", help="query and key/value heads")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--layout", choices=("zigzag", "contiguous"), default="zigzag")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--max-gather-bytes", type=int)
    parser.add_argument(
        "--long-dense", action="store_true", help=f"dense from {LONG} tokens on too"
    )
    parser.add_argument(
        "--host-gb-s", type=float, default=400.0, help="GB/s that a host gets from another"
    )
    parser.add_argument("--json", type=Path, help="file for the numbers, a line each")
    args = parser.parse_args(arguments)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.q_heads, args.kv_heads = (int(part) for part in args.heads.split("/"))
    return args


def start(args: argparse.Namespace) -> torch.device:
    """Joins the group that torchrun describes."""
    if "LOCAL_RANK" not in os.environ:
        raise SystemExit("context_parallel.py: run it by torchrun --standalone --nproc-per-node 2")
    if args.device == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    # Gathers start among kernels that fill the GPU: they must not wait for the end of these.
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    dist.init_process_group("nccl", pg_options=options, device_id=device)
    return device


def main() -> int:
    args = parse()
    device = start(args)
    clock = Clock(device, args.rounds)
    speaks = dist.get_rank() == 0
    wrong = 0
    if speaks:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        print(f"# {dist.get_world_size()} x {name}, torch {torch.__version__}")
        print(f"# {' '.join(sys.argv[1:])}")
        print("# milliseconds; GB/s that reach a rank; hidden: of the gathers, by the model")
        print(HEADER.format(world=dist.get_world_size()))
    with torch.no_grad():
        for length in args.lengths:
            for read in (args.read or READ.get(length, 0.1), 1.0):
                if read >= 1 and length >= LONG and not args.long_dense:
                    continue
                shape = Shape(length, args.q_heads, args.kv_heads, args.head_dim)
                found = measure(Case(args, device, shape, read), clock)
                wrong += not found["error"] <= TOLERANCE
                if speaks:
                    print(table_row(found), flush=True)
                    if args.json:
                        with args.json.open("a") as file:
                            print(json.dumps(found), file=file)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    dist.destroy_process_group()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
