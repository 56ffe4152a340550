"""Inputs of the comparison: random heads, block lists, and exact attention of sampled rows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED_ROWS = 16
#: Relative L2 distance from exact attention over which a result counts as wrong.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Shape:
    length: int
    q_heads: int
    kv_heads: int
    head_dim: int

    def dense_flops(self, causal: bool) -> float:
        pairs = self.length**2 / (2 if causal else 1)
        return 4.0 * self.q_heads * self.head_dim * pairs

    def block_flops(self, num_blocks: int, block_size: int) -> float:
        """Of whole blocks, as executed."""
        return 4.0 * self.head_dim * block_size**2 * num_blocks

    def heads(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}"


@dataclass(frozen=True)
class Inputs:
    """``q [1, N, Hq, D]``, ``k, v [1, N, Hkv, D]``."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor


def random_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    random = torch.Generator(device).manual_seed(7)

    def heads(count: int) -> Tensor:
        size = (1, shape.length, count, shape.head_dim)
        return torch.randn(size, generator=random, dtype=dtype, device=device)

    return Inputs(shape, heads(shape.q_heads), heads(shape.kv_heads), heads(shape.kv_heads))


@dataclass(frozen=True)
class Chosen:
    """Which key blocks each query block of each head reads: bool ``[Hq, Mb, Nb]``, causal.

    The diagonal block is always chosen, so a list is the blocks below it and then itself.
    """

    mask: Tensor
    block_size: int

    @property
    def num_blocks(self) -> int:
        return int(self.mask.sum())

    def density(self) -> float:
        """Share of the visible blocks."""
        heads, rows, _ = self.mask.shape
        return self.num_blocks / (heads * rows * (rows + 1) / 2)

    def lists(self, with_diagonal: bool, compact: bool) -> tuple[Tensor, Tensor]:
        """Ascending block lists: indices int32 ``[1, Hq, Mb, C]`` and counts ``[1, Hq, Mb]``.

        C is the longest list when compact, else Nb.
        """
        rows = self.mask.shape[1]
        diagonal = torch.eye(rows, dtype=torch.bool, device=self.mask.device)
        mask = self.mask if with_diagonal else self.mask & ~diagonal
        counts = mask.sum(-1, dtype=torch.int32)
        capacity = max(1, int(counts.max())) if compact else rows
        indices = torch.empty((*counts.shape, capacity), dtype=torch.int32, device=mask.device)
        for head, head_mask in enumerate(mask):  # one at a time: sorting needs much memory
            order = head_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
            indices[head] = order[:, :capacity]
        return indices[None], counts[None]

    def rows(self, positions: Tensor) -> Tensor:
        """bool ``[Hq, len(positions), Nb]``."""
        return self.mask[:, positions // self.block_size]


def random_blocks(shape: Shape, block_size: int, density: float, device: torch.device) -> Chosen:
    """A random share of each row's visible blocks for each head, the diagonal among them."""
    num_blocks = -(-shape.length // block_size)
    random = torch.Generator(device).manual_seed(11)
    row = torch.arange(num_blocks, device=device)
    counts = torch.ceil(density * (row + 1) - 1e-6).long().clamp(min=1)
    mask = torch.empty((shape.q_heads, num_blocks, num_blocks), dtype=torch.bool, device=device)
    for head in range(shape.q_heads):
        keys = torch.rand((num_blocks, num_blocks), generator=random, device=device)
        keys.masked_fill_(row[None, :] > row[:, None], -1.0)
        keys.fill_diagonal_(2.0)
        lowest = keys.sort(dim=-1, descending=True).values.gather(1, (counts - 1)[:, None])
        mask[head] = keys >= lowest
    return Chosen(mask, block_size)


def selected_blocks(indices: Tensor, counts: Tensor, block_size: int) -> Chosen:
    """The first ``counts [1, Hq, Mb]`` entries of shared rankings ``indices [1, L, Mb, Nb]``."""
    _, num_lists, num_rows, num_blocks = indices.shape
    q_heads = counts.shape[1]
    place = torch.arange(num_blocks, device=indices.device)
    mask = torch.zeros((q_heads, num_rows, num_blocks), dtype=torch.bool, device=indices.device)
    for head in range(q_heads):
        ranking = indices[0, head // (q_heads // num_lists)].long().clamp(min=0)
        taken = place < counts[0, head][:, None]
        # A place past the visible blocks names block 0; adding it up leaves a taken block taken.
        mask[head] = torch.zeros_like(ranking).scatter_add_(1, ranking, taken.long()) > 0
    return Chosen(mask, block_size)


def blocks_for_density(num_blocks: int, density: float) -> int:
    """The fewest blocks per row that make a share of the blocks that causal rows see."""
    total = num_blocks * (num_blocks + 1) // 2
    for count in range(1, num_blocks + 1):
        if count * (count + 1) // 2 + (num_blocks - count) * count >= density * total:
            return count
    return num_blocks


class ExactRows:
    """Exact attention in fp32 of sampled query rows, to judge results by. Outputs begin with query
    ``first``; a ``window`` shows a query so many keys, itself the last."""

    def __init__(
        self,
        inputs: Inputs,
        causal: bool = True,
        chosen: Chosen | None = None,
        first: int = 0,
        window: int | None = None,
    ):
        shape, device = inputs.shape, inputs.q.device
        self.first = first
        count = min(SAMPLED_ROWS, shape.length - first)
        self.positions = torch.linspace(first, shape.length - 1, count, device=device).long()
        key = torch.arange(shape.length, device=device)
        visible = torch.ones((1, count, shape.length), dtype=torch.bool, device=device)
        if causal:
            visible = (key <= self.positions[:, None])[None]
        if window is not None:
            visible = visible & (key > self.positions[:, None] - window)
        if chosen is not None:
            taken = chosen.rows(self.positions)
            visible = visible & taken.repeat_interleave(chosen.block_size, -1)[..., : shape.length]
        group = shape.q_heads // shape.kv_heads
        outs = []
        for head in range(shape.q_heads):  # one at a time: fp32 keys of all heads are large
            k, v = (x[0, :, head // group].float() for x in (inputs.k, inputs.v))
            logits = inputs.q[0, self.positions, head].float() @ k.T / math.sqrt(shape.head_dim)
            seen = visible[head if chosen is not None else 0]
            outs.append(logits.masked_fill(~seen, -math.inf).softmax(-1) @ v)
        self.out = torch.stack(outs, 1)

    def error(self, out: Tensor) -> float:
        """Relative L2 distance of ``out [1, N, Hq, D]`` at the sampled rows; NaN if it has any."""
        got = out[0, self.positions - self.first].float()
        return float((got - self.out).norm() / self.out.norm())
