"""Clocks, dense attention to compare with, and exact attention of sampled rows."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PROBE_TOKENS = 256


class Stopwatch:
    """Times named pieces of work: by CUDA events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, list[float]] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self._device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds.setdefault(name, []).append(time.perf_counter() - start)
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def medians(self) -> dict[str, float]:
        """Median of each name in milliseconds, in the order of first use."""
        if self._events:
            torch.cuda.synchronize(self._device)
        for name, begin, end in self._events:
            self._seconds.setdefault(name, []).append(begin.elapsed_time(end) / 1e3)
        self._events.clear()
        return {name: 1e3 * statistics.median(times) for name, times in self._seconds.items()}


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's causal attention on ``[B, N, H, D]`` tensors, kv heads shared, nothing copied."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return out.transpose(1, 2)


def dense_backends(q: Tensor, k: Tensor, v: Tensor) -> dict[str, list[SDPBackend]]:
    """The fused backends of torch's attention that can run this call; all together if none can."""
    fused = {"flash": [SDPBackend.FLASH_ATTENTION]}
    if q.is_cuda:
        fused["cudnn"] = [SDPBackend.CUDNN_ATTENTION]
    usable = {}
    for name, backends in fused.items():
        # One short call tells: a backend that can't is refused before any work is done.
        try:
            with sdpa_kernel(backends):
                dense_attention(*(x[:, :PROBE_TOKENS] for x in (q, k, v)))
        except RuntimeError:
            continue
        usable[name] = backends
    others = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return usable or {"not fused": others}


def sample_rows(length: int, count: int, seed: int) -> Tensor:
    """``count`` query positions in rising order, one at random from each equal stretch."""
    count = min(count, length)
    random = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, length, count + 1, dtype=torch.float64)
    spread = torch.rand(count, generator=random, dtype=torch.float64)
    rows = (edges[:-1] + spread * (edges[1:] - edges[:-1])).long()
    return rows.clamp(max=length - 1)


@dataclass(frozen=True)
class ExactRows:
    """Exact attention of one head at R query rows, in float64."""

    block_mass: Tensor  # [R, Nb], probability in every key block
    kept: Tensor  # [R], probability in the chosen blocks
    out: Tensor  # [R, D], over all keys
    chosen_out: Tensor  # [R, D], over the keys of the chosen blocks


def exact_rows(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, chosen: Tensor, block_size: int
) -> ExactRows:
    """Causal attention of the given rows of one head, over all keys and over chosen blocks.

    Args:
        q: ``[R, D]``, the rows' queries.
        k: ``[N, D]``.
        v: ``[N, D]``.
        rows: int64 ``[R]``, their positions.
        chosen: bool ``[R, Nb]``, blocks that sparse attention read for each row.
        block_size: tokens of a key block.
    """
    num_keys, head_dim = k.shape
    logits = q.double() @ k.double().T * head_dim**-0.5
    hidden = torch.arange(num_keys, device=k.device) > rows[:, None]
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(dim=1)
    values = v.double()
    out = weights @ values
    tail = -num_keys % block_size
    blocks = torch.nn.functional.pad(weights, (0, tail)).unflatten(1, (-1, block_size))
    block_mass = blocks.sum(2)
    kept = (block_mass * chosen).sum(1)
    chosen_weights = (blocks * chosen[:, :, None]).flatten(1)[:, :num_keys]
    chosen_out = (chosen_weights @ values) / kept[:, None]
    return ExactRows(block_mass, kept, out, chosen_out)


def chosen_blocks(indices: Tensor, counts: Tensor, head: int, q_blocks: Tensor) -> Tensor:
    """Which key blocks a head reads in some query blocks, bool ``[R, Nb]``, of batch entry 0.

    Args:
        indices: int32 ``[B, g, Mb, Nb]``.
        counts: int32 ``[B, Hq, Mb]``.
        head: query head.
        q_blocks: int64 ``[R]``.
    """
    group = head * indices.shape[1] // counts.shape[1]
    lists = indices[0, group, q_blocks].long()
    num_blocks = lists.shape[1]
    read = torch.arange(num_blocks, device=lists.device) < counts[0, head, q_blocks, None]
    # Unread places point at a column that is dropped again.
    target = torch.where(read, lists, num_blocks)
    chosen = torch.zeros(len(q_blocks), num_blocks + 1, dtype=torch.bool, device=lists.device)
    return chosen.scatter_(1, target, True)[:, :num_blocks]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Length of the difference over length of what was wanted."""
    return float((got.double() - wanted).norm() / wanted.norm())
