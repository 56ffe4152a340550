"""The sections of compare_peers.py: which cases each has, and who competes in them.

A section is a function of the options that lists ``(case, make_entries)``; ``make_entries(bench)``
makes the inputs of the case and its entries when its turn comes.
"""

import argparse
import functools
import itertools
from collections.abc import Callable

import proxyattn
import torch
from peers import (
    OURS,
    Entry,
    chunk_builders,
    dense_builders,
    ours_dense,
    ours_over_lists,
    ours_sparse,
    sparse_builders,
    window_builders,
)
from peers_inputs import (
    Chosen,
    ExactRows,
    Inputs,
    Shape,
    blocks_for_density,
    random_blocks,
    random_inputs,
    selected_blocks,
)
from peers_packs import ExactSequences, Pack, packed_builders, random_pack
from peers_timing import as_graph
from torch import Tensor

Entries = dict[str, Entry]
Cases = list[tuple[dict, Callable[["Bench"], Entries]]]  # noqa: F821

MODES = ("top_p", "last_block")
#: Heads of a group need unlike numbers of blocks: these shares of the mean, in turn.
BUDGET_SHARES = (0.5, 0.85, 1.15, 1.5)
#: Share of the causal blocks that proxy_attention reads end to end; less of a longer prompt.
END_TO_END_DENSITY = 0.1
LONG, LONG_DENSITY = 262_144, 0.065
PIPELINE_BLOCK = 128
#: Of random inputs every block holds more mass than this leaves out.
ALMOST_ALL = 0.99999
#: Of any inputs a block or two hold this much.
ALMOST_NOTHING = 0.001
LONGEST_NON_CAUSAL = 32768
CHUNKS = (16384, 8192, 2048)
WINDOW = 1024


def shapes(args: argparse.Namespace, lengths: list[int]) -> list[Shape]:
    """Every head shape at every length: those asked for, or the section's own."""
    if args.lengths:
        lengths = args.lengths
    elif args.device == "cpu":
        lengths = [512]
    return [Shape(n, *heads, args.head_dim) for heads in args.heads for n in lengths]


def case_of(shape: Shape, **more: object) -> dict:
    return {"length": shape.length, "heads": shape.heads(), "head_dim": shape.head_dim, **more}


def inputs_for(bench, shape: Shape) -> Inputs:
    return random_inputs(shape, bench.dtype, bench.device)


# ---- dense


def dense_cases(args: argparse.Namespace) -> Cases:
    causal = shapes(args, [8192, 32768, 131072])
    short = [shape for shape in causal if shape.length <= LONGEST_NON_CAUSAL]
    longest = max((shape.length for shape in short), default=0)
    points = [(shape, True) for shape in causal]
    points += [(shape, False) for shape in short if shape.length == longest]
    return [
        (case_of(shape, causal=int(causal)), functools.partial(dense_entries, shape, causal))
        for shape, causal in points
    ]


def dense_entries(shape: Shape, causal: bool, bench) -> Entries:
    inputs = inputs_for(bench, shape)
    exact, flops = ExactRows(inputs, causal), shape.dense_flops(causal)
    builders = {OURS: ours_dense, **dense_builders(bench.device)}
    return {
        who: Entry(functools.partial(build, inputs, causal), flops, exact)
        for who, build in builders.items()
    }


# ---- sparse and select


def sparse_cases(args: argparse.Namespace) -> Cases:
    points = itertools.product(args.block_sizes, shapes(args, [32768, 131072]), args.densities)
    return [
        (
            case_of(shape, block_size=size, density=density),
            functools.partial(sparse_entries, shape, size, density),
        )
        for size, shape, density in points
    ]


def sparse_entries(shape: Shape, block_size: int, density: float, bench) -> Entries:
    inputs = inputs_for(bench, shape)
    chosen = random_blocks(shape, block_size, density, bench.device)
    return entries_over(inputs, chosen, functools.partial(ours_sparse, inputs, chosen), bench)


def entries_over(inputs: Inputs, chosen: Chosen, ours: Callable, bench) -> Entries:
    """All block-sparse competitors over the same blocks."""
    exact = ExactRows(inputs, chosen=chosen)
    flops = inputs.shape.block_flops(chosen.num_blocks, chosen.block_size)
    builders = {OURS: ours}
    for who, build in sparse_builders(bench.device).items():
        builders[who] = functools.partial(build, inputs, chosen)
    return {who: Entry(build, flops, exact) for who, build in builders.items()}


def select_cases(args: argparse.Namespace) -> Cases:
    densities = [density for density in args.densities if density < 1]
    points = itertools.product(args.block_sizes, shapes(args, [32768, 131072]), densities)
    return [
        (
            case_of(shape, block_size=size, density=density),
            functools.partial(select_entries, shape, size, density),
        )
        for size, shape, density in points
    ]


def select_entries(shape: Shape, block_size: int, density: float, bench) -> Entries:
    inputs = inputs_for(bench, shape)
    num_blocks = -(-shape.length // block_size)
    mean = blocks_for_density(num_blocks, density)
    wanted = [max(1, round(mean * BUDGET_SHARES[head % 4])) for head in range(shape.q_heads)]
    budgets = torch.tensor([wanted], dtype=torch.int32, device=bench.device)
    settings = {"mode": "last_block", "min_budget": 0}
    estimation = Estimation(inputs, shape.kv_heads, bench.args.stride, block_size, **settings)
    indices, counts = estimation.select(estimation.score(estimation.pool()), budgets)
    chosen = selected_blocks(indices, counts, block_size)
    ours = functools.partial(ours_over_lists, inputs, indices, counts, block_size)
    return entries_over(inputs, chosen, ours, bench)


# ---- estimate


class Estimation:
    """The stages before attention with fixed settings."""

    def __init__(
        self,
        inputs: Inputs,
        proxies: int,
        stride: int,
        block_size: int = 128,
        mode: str = "top_p",
        gamma: float | None = None,
        min_budget: int | None = None,
    ):
        self.q, self.k = inputs.q, inputs.k
        self.length = inputs.shape.length
        self.proxies, self.stride, self.block_size = proxies, stride, block_size
        self.mode, self.gamma, self.min_budget = mode, gamma, min_budget

    def pool(self) -> tuple[Tensor, Tensor]:
        return proxyattn.pool_heads(self.q, self.k, self.proxies, self.stride)

    def needs(self) -> Tensor:
        if self.mode == "top_p":
            return proxyattn.estimate_shares(self.q, self.k, self.block_size)
        gamma = {} if self.gamma is None else {"gamma": self.gamma}
        return proxyattn.estimate_budgets(self.q, self.k, block_size=self.block_size, **gamma)

    def score(self, pooled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return proxyattn.score_blocks(
            *pooled,
            self.length,
            self.length,
            self.stride,
            self.block_size,
            with_mass=self.mode == "top_p",
        )

    def select(self, scores: tuple[Tensor, Tensor], needs: Tensor) -> tuple[Tensor, Tensor]:
        return proxyattn.select_blocks(
            *scores,
            needs,
            self.length,
            self.length,
            self.q.shape[2],
            self.block_size,
            budget_mode=self.mode,
            gamma=self.gamma,
            min_budget=self.min_budget,
        )

    def all(self) -> tuple[Tensor, Tensor]:
        """indices and counts, in one call."""
        return proxyattn.choose_blocks(
            self.q,
            self.k,
            gamma=self.gamma,
            stride=self.stride,
            block_size=self.block_size,
            num_proxy_heads=self.proxies,
            budget_mode=self.mode,
            min_budget=self.min_budget,
        )


def estimate_cases(args: argparse.Namespace) -> Cases:
    lengths = [512] if args.device == "cpu" else [32768, 131072, 262144]
    points = itertools.product(args.lengths or lengths, args.proxies, MODES)
    cases = []
    for length, (q_heads, kv_heads, proxies), mode in points:
        shape = Shape(length, q_heads, kv_heads, args.head_dim)
        make = functools.partial(estimate_entries, shape, proxies, mode)
        cases.append((case_of(shape, proxies=proxies, mode=mode), make))
    return cases


def estimate_entries(shape: Shape, proxies: int, mode: str, bench) -> Entries:
    estimation = Estimation(inputs_for(bench, shape), proxies, bench.args.stride, mode=mode)
    pooled, needs = estimation.pool(), estimation.needs()
    scores = estimation.score(pooled)
    calls = {
        "all": estimation.all,
        "pool": estimation.pool,
        "needs": estimation.needs,
        "score": lambda: estimation.score(pooled),
        "select": lambda: estimation.select(scores, needs),
    }
    entries = {who: Entry(functools.partial(lambda call: call, c)) for who, c in calls.items()}
    if bench.device.type != "cuda":
        return entries
    # The replay comes first: times of the others are given over it.
    graph = Entry(lambda: checked_graph(estimation.all))
    return {"all, CUDA graph": graph, **entries}


def checked_graph(call: Callable[[], tuple[Tensor, Tensor]]) -> Callable:
    """The call as a graph that gives the same lists."""
    indices, counts = call()
    replay = as_graph(call)
    got_indices, got_counts = replay()
    if not (torch.equal(indices, got_indices) and torch.equal(counts, got_counts)):
        raise RuntimeError("the replay chose other blocks than the call")
    return replay


# ---- end to end


def end_to_end_cases(args: argparse.Namespace) -> Cases:
    return [
        (
            case_of(shape, density=args.read or end_to_end_density(shape)),
            functools.partial(end_to_end_entries, shape),
        )
        for shape in shapes(args, [8192, 16384, 32768, 131072, 262144])
    ]


def end_to_end_density(shape: Shape) -> float:
    return LONG_DENSITY if shape.length >= LONG else END_TO_END_DENSITY


def end_to_end_entries(shape: Shape, bench) -> Entries:
    """proxy_attention with one and with all proxy heads in both modes, then dense attention.

    With a gamma this small heads need little more than the forced blocks, though that has to be
    found out, so the minimum budget sets how much is read. Two more read everything: one because it
    is told to, one because its budgets come out so.
    """
    inputs = inputs_for(bench, shape)
    density = bench.args.read or end_to_end_density(shape)
    blocks = blocks_for_density(-(-shape.length // PIPELINE_BLOCK), density)
    sparse = {"gamma": ALMOST_NOTHING, "min_budget": PIPELINE_BLOCK * blocks}
    entries = {}
    for proxies, mode in itertools.product(sorted({1, shape.kv_heads}), MODES):
        entry = pipeline_entry(inputs, proxies, mode, sparse, bench)
        entries[f"{OURS} g={proxies} {mode}"] = entry
    for name, gamma in (("all blocks", 1.0), ("budgets of all blocks", ALMOST_ALL)):
        settings = {"gamma": gamma, "min_budget": 0}
        entry = pipeline_entry(inputs, shape.kv_heads, "last_block", settings, bench)
        entries[f"{OURS} {name}"] = entry
    exact, flops = ExactRows(inputs), shape.dense_flops(causal=True)
    for who, build in dense_builders(bench.device).items():
        entries[who] = Entry(functools.partial(build, inputs, True), flops, exact)
    return entries


def pipeline_entry(inputs: Inputs, proxies: int, mode: str, settings: dict, bench) -> Entry:
    shape, size = inputs.shape, PIPELINE_BLOCK
    estimation = Estimation(inputs, proxies, bench.args.stride, size, mode, **settings)
    chosen = selected_blocks(*estimation.all(), size)

    def call() -> Tensor:
        return proxyattn.proxy_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            stride=bench.args.stride,
            block_size=size,
            num_proxy_heads=proxies,
            budget_mode=mode,
            **settings,
        )

    flops = shape.block_flops(chosen.num_blocks, size)
    note = f"reads {100 * chosen.density():.1f} %"
    return Entry(lambda: call, flops, ExactRows(inputs, chosen=chosen), note)


# ---- serving


def serving_cases(args: argparse.Namespace) -> Cases:
    lengths = args.lengths or ([512] if args.device == "cpu" else [65536])
    return [
        (
            case_of(shape, seqs="mix", density=args.read or END_TO_END_DENSITY),
            functools.partial(serving_entries, shape),
        )
        for shape in (Shape(n, *heads, args.head_dim) for heads in args.heads for n in lengths)
    ]


def serving_entries(shape: Shape, bench) -> Entries:
    """Sequences up to the length in one call, keys packed or in pages, and one by one; then dense.

    The minimum budget is the same for all of them, and makes the density of the longest.
    """
    pack = random_pack(shape, bench.dtype, bench.device)
    size, proxies = PIPELINE_BLOCK, shape.kv_heads
    density = bench.args.read or END_TO_END_DENSITY
    blocks = blocks_for_density(-(-shape.length // size), density)
    sparse = {"gamma": ALMOST_NOTHING, "min_budget": size * blocks}
    settings = {"stride": bench.args.stride, "block_size": size, "num_proxy_heads": proxies}

    def chosen(inputs: Inputs) -> Chosen:
        lists = Estimation(inputs, proxies, bench.args.stride, size, **sparse).all()
        return selected_blocks(*lists, size)

    exact = ExactSequences(pack, lambda inputs: ExactRows(inputs, chosen=chosen(inputs)))
    num_blocks = sum(chosen(pack.sequence(i)).num_blocks for i in range(len(pack.lengths)))
    flops = shape.block_flops(num_blocks, size)
    calls = {
        f"{OURS} one call": functools.partial(ours_packed, pack, 0, **settings, **sparse),
        f"{OURS} pages of 64": functools.partial(ours_packed, pack, 64, **settings, **sparse),
        f"{OURS} pages of 16": functools.partial(ours_packed, pack, 16, **settings, **sparse),
        f"{OURS} one by one": functools.partial(ours_one_by_one, pack, **settings, **sparse),
    }
    entries = {who: Entry(build, flops, exact) for who, build in calls.items()}
    dense = {
        f"{OURS} all blocks": functools.partial(ours_packed, page=0, **settings, gamma=1.0),
        **packed_builders(bench.device),
    }
    exact = ExactSequences(pack, ExactRows)
    for who, build in dense.items():
        entries[who] = Entry(functools.partial(build, pack), pack.dense_flops(), exact)
    return entries


def ours_packed(pack: Pack, page: int, **settings) -> Callable[[], Tensor]:
    arguments = pack.arguments(page)
    return lambda: proxyattn.proxy_attention_varlen(**arguments, **settings)


def ours_one_by_one(pack: Pack, **settings) -> Callable[[], Tensor]:
    sequences = [pack.sequence(i) for i in range(len(pack.lengths))]

    def call() -> Tensor:
        outs = [proxyattn.proxy_attention(x.q, x.k, x.v, **settings)[0] for x in sequences]
        return torch.cat(outs)

    return call


# ---- chunks


def chunk_cases(args: argparse.Namespace) -> Cases:
    """The last queries of a prompt, whose keys are there already. Prefixes end where a block does,
    so that a chunk reads what its rows read in the whole prompt."""
    lengths = args.lengths or ([512] if args.device == "cpu" else [131072])
    chunks = [128] if args.device == "cpu" else CHUNKS
    cases = []
    prefixes = [-(-length // PIPELINE_BLOCK) * PIPELINE_BLOCK for length in lengths]
    for prefix, heads, chunk in itertools.product(prefixes, args.heads, chunks):
        shape = Shape(prefix + chunk, *heads, args.head_dim)
        case = {"prefix": prefix, "chunk": chunk, "heads": shape.heads(), "D": args.head_dim}
        case["density"] = args.read or END_TO_END_DENSITY
        cases.append((case, functools.partial(chunk_entries, shape, chunk)))
    return cases


def chunk_entries(shape: Shape, chunk: int, bench) -> Entries:
    """The whole prompt, then its last chunk, each with the blocks that it executes: what a chunk
    costs over its share is the ratio of their TFLOPS."""
    inputs = inputs_for(bench, shape)
    size, proxies, first = PIPELINE_BLOCK, shape.kv_heads, shape.length - chunk
    density = bench.args.read or END_TO_END_DENSITY
    blocks = blocks_for_density(-(-shape.length // size), density)
    sparse = {"gamma": ALMOST_NOTHING, "min_budget": size * blocks}
    stride = bench.args.stride
    chosen = selected_blocks(*Estimation(inputs, proxies, stride, size, **sparse).all(), size)
    settings = {"stride": stride, "block_size": size, "num_proxy_heads": proxies, **sparse}

    def ours(first: int) -> Callable[[], Tensor]:
        q = inputs.q[:, first:]
        return lambda: proxyattn.proxy_attention(q, inputs.k, inputs.v, **settings)

    def entry(first: int) -> Entry:
        flops = shape.block_flops(int(chosen.mask[:, first // size :].sum()), size)
        exact = ExactRows(inputs, chosen=chosen, first=first)
        return Entry(functools.partial(ours, first), flops, exact)

    entries = {f"{OURS} whole": entry(0), f"{OURS} chunk": entry(first)}
    flops = shape.dense_flops(causal=True) - Shape(
        first, shape.q_heads, shape.kv_heads, shape.head_dim
    ).dense_flops(causal=True)
    exact = ExactRows(inputs, first=first)
    for who, build in chunk_builders(bench.device).items():
        entries[f"{who} chunk"] = Entry(functools.partial(build, inputs, first), flops, exact)
    return entries


# ---- windows


def window_cases(args: argparse.Namespace) -> Cases:
    window = 100 if args.device == "cpu" else WINDOW
    return [
        (case_of(shape, window=window), functools.partial(window_entries, shape, window))
        for shape in shapes(args, [32768, 131072])
    ]


def window_entries(shape: Shape, window: int, bench) -> Entries:
    """A sliding window, then lists of the blocks that it touches without a window."""
    inputs = inputs_for(bench, shape)
    size = PIPELINE_BLOCK
    touched = touched_blocks(shape, window, size, bench.device)
    flops = shape.block_flops(touched.num_blocks, size)
    exact = ExactRows(inputs, window=window)

    def ours() -> Callable[[], Tensor]:
        settings = {"gamma": 1.0, "block_size": size, "window": window}
        return lambda: proxyattn.proxy_attention(inputs.q, inputs.k, inputs.v, **settings)

    entries = {OURS: Entry(ours, flops, exact)}
    lists = functools.partial(ours_sparse, inputs, touched)
    entries[f"{OURS} its blocks whole"] = Entry(lists, flops, ExactRows(inputs, chosen=touched))
    for who, build in window_builders(bench.device).items():
        entries[who] = Entry(functools.partial(build, inputs, window), flops, exact)
    return entries


def touched_blocks(shape: Shape, window: int, size: int, device: torch.device) -> Chosen:
    num_blocks = -(-shape.length // size)
    row = torch.arange(num_blocks, device=device)
    first = (row * size - window + 1).clamp(min=0) // size  # of the block's first query
    mask = (row <= row[:, None]) & (row >= first[:, None])
    return Chosen(mask.expand(shape.q_heads, -1, -1), size)


SECTIONS: dict[str, Callable[[argparse.Namespace], Cases]] = {
    "dense": dense_cases,
    "sparse": sparse_cases,
    "select": select_cases,
    "estimate": estimate_cases,
    "end2end": end_to_end_cases,
    "serving": serving_cases,
    "chunks": chunk_cases,
    "windows": window_cases,
}
