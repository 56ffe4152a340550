"""Clocks, dense attention to compare with, exact attention of sampled rows, and what is kept."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from proxyattn import ops
from proxyattn._stages import StageCall, visible_blocks

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
    """Exact causal attention of one head at R query rows, in float64."""

    weights: Tensor  # [R, N], probability of every key
    values: Tensor  # [N, D]

    @property
    def out(self) -> Tensor:
        """Attention over all keys, ``[R, D]``."""
        return self.weights @ self.values

    def block_mass(self, block_size: int) -> Tensor:
        """Probability in every key block, ``[R, Nb]``."""
        return self._by_block(block_size).sum(2)

    def kept(self, chosen: Tensor, block_size: int) -> Tensor:
        """Probability in the chosen blocks, ``[R]``, from bool ``[R, Nb]``."""
        return (self.block_mass(block_size) * chosen).sum(1)

    def chosen_out(self, chosen: Tensor, block_size: int) -> Tensor:
        """Attention over the keys of the chosen blocks alone, ``[R, D]``."""
        weights = self._by_block(block_size) * chosen[:, :, None]
        weights = weights.flatten(1)[:, : self.values.shape[0]]
        return (weights @ self.values) / weights.sum(1, keepdim=True)

    def _by_block(self, block_size: int) -> Tensor:
        tail = -self.values.shape[0] % block_size
        return torch.nn.functional.pad(self.weights, (0, tail)).unflatten(1, (-1, block_size))


def exact_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> ExactRows:
    """Causal attention of the given rows of one head.

    Args:
        q: ``[R, D]``, the rows' queries.
        k: ``[N, D]``.
        v: ``[N, D]``.
        rows: int64 ``[R]``, their positions.
    """
    num_keys, head_dim = k.shape
    logits = q.double() @ k.double().T * head_dim**-0.5
    hidden = torch.arange(num_keys, device=k.device) > rows[:, None]
    return ExactRows(logits.masked_fill_(hidden, -torch.inf).softmax(dim=1), v.double())


def kept_mass(call: StageCall, num_blocks: int) -> Tensor:
    """Share of exact attention that lies in the blocks read, fp64 ``[B, Hq]``.

    It is the mean over all queries of ``num_blocks`` evenly spaced query blocks. The log-sum-exp of
    a query over its chosen blocks and the one over all blocks differ by the log of what is kept.
    """
    block_size = call.settings.block_size
    q_len, kv_len = call.q.shape[1], call.k.shape[1]
    batch, heads, num_q_blocks = call.outputs.counts.shape
    device = call.q.device
    spaced = torch.linspace(0, num_q_blocks - 1, min(num_blocks, num_q_blocks), device=device)
    sampled = torch.zeros(num_q_blocks, dtype=torch.bool, device=device)
    sampled[spaced.round().long()] = True

    num_kv_blocks = -(-kv_len // block_size)
    every = torch.arange(num_kv_blocks, dtype=torch.int32, device=device)
    every = every.expand(batch, 1, num_q_blocks, num_kv_blocks)
    visible = visible_blocks(q_len, kv_len, block_size).to(device, torch.int32)

    def log_sum(indices: Tensor, counts: Tensor) -> Tensor:
        # Blocks that are not sampled read nothing, and cost nothing.
        counts = torch.where(sampled, counts, 0).expand(batch, heads, num_q_blocks).contiguous()
        _, lse = ops.block_sparse_attention(
            call.q, call.k, call.v, indices, counts, block_size, True, call.scale, True
        )
        return lse[:, :, sampled.repeat_interleave(block_size)[:q_len]].double()

    chosen = log_sum(call.outputs.indices, call.outputs.counts)
    return (chosen - log_sum(every, visible)).exp().mean(2)


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
