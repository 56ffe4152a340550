"""Ways to choose key blocks: this package's, XAttention's and FlexPrefill's.

A selector says for causal ``q [1, N, Hq, D]`` and ``k [1, N, Hkv, D]`` which key blocks each query
block reads, as the lists of ``proxyattn.block_sparse_attention``; all then run on that kernel. The
two others are written here from their papers and published code, to choose the same blocks, not to
be fast: XAttention (arXiv 2503.16428) and FlexPrefill (arXiv 2502.20766). Both look at every query
head on its own, and count whole blocks of 128 tokens.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import proxyattn
import torch
from proxyattn.ops import DEFAULT_BLOCK_SIZE
from torch import Tensor


class Lists(NamedTuple):
    indices: Tensor  # int32 [1, L, Nb, C]
    counts: Tensor  # int32 [1, Hq, Nb]
    block_size: int


@dataclass(frozen=True)
class Dense:
    """Reads everything."""

    settings: dict = field(default_factory=dict)
    family = "dense"


#: The setting of the ProxyAttn paper, arXiv 2509.24745.
PAPER = {
    "budget_mode": "last_block",
    "pooling": "first",
    "gamma": 0.95,
    "block_size": 128,
    "min_budget": 2048,
}


@dataclass(frozen=True)
class Proxy:
    """This package: proxyattn.choose_blocks with its defaults or a preset, and changes to that."""

    settings: dict = field(default_factory=dict)
    family: str = "proxyattn"
    preset: dict = field(default_factory=dict)

    def choose(self, q: Tensor, k: Tensor, scale: float) -> Lists:
        chosen = {"block_size": DEFAULT_BLOCK_SIZE, **self.preset, **self.settings}
        return Lists(*proxyattn.choose_blocks(q, k, scale=scale, **chosen), chosen["block_size"])


@dataclass(frozen=True)
class XAttention:
    """Blocks by the sums of antidiagonals of their cells of stride x stride logits.

    Cells stand for block mass: a softmax over the cells that a row of cells sees, of the mean of
    each cell's antidiagonal. The first and the last visible block are taken, then the heaviest
    until ``threshold`` of the mass is reached. Published defaults: stride 8 or 16, .9, 128.
    """

    stride: int = 8
    threshold: float = 0.9
    family = "XAttention"
    block_size = 128

    @property
    def settings(self) -> dict:
        return asdict(self)

    def choose(self, q: Tensor, k: Tensor, scale: float) -> Lists:
        mass = torch.stack([self._mass(*heads, scale) for heads in _heads(q, k)])
        visible, forced = _causal(mass), _diagonal(mass)
        forced[..., 0] = True
        ranks = mass.masked_fill(forced, math.inf).masked_fill(~visible, -1)
        order = ranks.argsort(-1, descending=True)
        # A forced block counts too, and what comes next is judged by all that was taken before.
        taken = mass.gather(-1, order).cumsum(-1)
        before = torch.nn.functional.pad(taken, (1, 0))[..., :-1]
        wanted = before < self.threshold * mass.sum(-1, keepdim=True)
        chosen = torch.zeros_like(forced).scatter(-1, order, wanted)
        return _lists((chosen | forced) & visible, self.block_size)

    def _mass(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """``q, k [N, D]`` to the mass of each pair of blocks, ``[Nb, Nb]``."""
        # An antidiagonal pairs the last query of a cell with its first key, and so on.
        queries = _windows(q, self.stride).flip(1).flatten(1)
        keys = _windows(k, self.stride).flatten(1)
        logits = (queries @ keys.T) * (scale / self.stride)
        logits.masked_fill_(~_causal(logits), -math.inf)
        cells = self.block_size // self.stride
        short = -len(logits) % cells
        padded = torch.nn.functional.pad(logits.softmax(-1), (0, short, 0, short))
        return padded.unflatten(1, (-1, cells)).unflatten(0, (-1, cells)).sum((1, 3))


@dataclass(frozen=True)
class FlexPrefill:
    """Each head by what its last queries see: whole columns and diagonals, or pooled attention.

    The true attention of the last block of queries is summed over key blocks, and the same is
    estimated from mean queries and mean keys. Where the root of the Jensen-Shannon divergence of
    the two is below ``tau``, the estimate is trusted: of the pooled attention of all query blocks,
    the heaviest pairs are taken until ``gamma`` of it is reached ("query-aware"). Elsewhere the
    head takes as many block columns and block diagonals as the token columns and diagonals that
    hold ``gamma`` would fill. ``min_budget`` tokens of either are always taken, and so are the
    first column and the main diagonal. Published settings: gamma .9 or .95, tau .1, 1024, 128.
    """

    gamma: float = 0.95
    tau: float = 0.1
    min_budget: int = 1024
    family = "FlexPrefill"
    block_size = 128

    @property
    def settings(self) -> dict:
        return asdict(self)

    def choose(self, q: Tensor, k: Tensor, scale: float) -> Lists:
        chosen = torch.stack([self._chosen(*heads, scale) for heads in _heads(q, k)])
        return _lists(chosen & _causal(chosen), self.block_size)

    def _chosen(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """``q, k [N, D]`` to bool ``[Nb, Nb]``."""
        columns, diagonals = self._last_attention(q, k, scale)
        column_blocks = _windows(columns, self.block_size).sum(1)
        diagonal_blocks = _windows(diagonals, self.block_size).sum(1)
        num_blocks = len(column_blocks)
        mean_keys = _window_means(k, self.block_size)
        mean_query = q[-self.block_size :].mean(0)
        estimate = (mean_keys @ mean_query * scale).softmax(-1)
        least = min(max(1, math.ceil(self.min_budget / self.block_size)), num_blocks)
        trusted = self._distance(estimate, column_blocks) < self.tau
        chosen = torch.zeros(num_blocks, num_blocks, dtype=torch.bool, device=q.device)
        num_columns = least if trusted else self._fill(columns, least, num_blocks)
        num_diagonals = least if trusted else self._fill(diagonals, least, num_blocks)
        column_blocks[0] = diagonal_blocks[0] = math.inf
        chosen[:, column_blocks.topk(num_columns).indices] = True
        rows = torch.arange(num_blocks, device=q.device)[:, None]
        columns_of = rows - diagonal_blocks.topk(num_diagonals).indices
        chosen[rows.expand_as(columns_of)[columns_of >= 0], columns_of[columns_of >= 0]] = True
        if trusted:
            mean_queries = _window_means(q, self.block_size)
            logits = mean_queries @ mean_keys.T * scale
            pooled = logits.masked_fill(~_causal(logits), -math.inf).softmax(-1).flatten()
            order = pooled.argsort(descending=True)
            wanted = pooled[order].cumsum(0) <= self.gamma * num_blocks
            chosen.view(-1)[order[wanted]] = True
        return chosen

    def _last_attention(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What the last queries put on each key, and on each distance back: both ``[N]``."""
        kv_len, rows = len(k), min(self.block_size, len(k))
        distance = torch.arange(kv_len - rows, kv_len, device=q.device)[:, None] - torch.arange(
            kv_len, device=q.device
        )
        logits = (q[-rows:] @ k.T * scale).masked_fill(distance < 0, -math.inf)
        mean = logits.softmax(-1) / rows
        diagonals = torch.zeros(kv_len, device=q.device)
        diagonals.index_add_(0, distance.clamp(min=0).flatten(), mean.flatten())
        return mean.sum(0), diagonals

    def _fill(self, lines: Tensor, least: int, most: int) -> int:
        """How many blocks the fewest token lines with a share gamma would fill."""
        covered = lines.sort(descending=True).values.cumsum(0)
        num_lines = int((covered <= self.gamma).sum()) + 1
        return min(max(num_lines // self.block_size + 1, least), most)

    @staticmethod
    def _distance(first: Tensor, second: Tensor) -> float:
        middle = (first + second) / 2
        halves = [torch.xlogy(part, part / middle).nan_to_num() for part in (first, second)]
        return math.sqrt(max(0.0, float(sum(halves).sum()) / 2))


def _heads(q: Tensor, k: Tensor):
    """Query heads with the kv heads that they read, in fp32."""
    group = q.shape[2] // k.shape[2]
    for head in range(q.shape[2]):
        yield q[0, :, head].float(), k[0, :, head // group].float()


def _windows(x: Tensor, size: int) -> Tensor:
    """``[N, ...]`` to ``[ceil(N / size), size, ...]``, zeros behind the end."""
    padding = (0, 0) * (x.dim() - 1) + (0, -len(x) % size)
    return torch.nn.functional.pad(x, padding).unflatten(0, (-1, size))


def _window_means(x: Tensor, size: int) -> Tensor:
    ones = torch.ones(len(x), 1, device=x.device)
    return _windows(x, size).sum(1) / _windows(ones, size).sum(1)


def _causal(square: Tensor) -> Tensor:
    """True where the column is not behind the row, in the last two dimensions."""
    return torch.ones_like(square, dtype=torch.bool).tril()


def _diagonal(square: Tensor) -> Tensor:
    return _causal(square) & _causal(square).mT


def _lists(chosen: Tensor, block_size: int) -> Lists:
    """bool ``[Hq, Nb, Nb]`` to lists of each head's own."""
    indices = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
    return Lists(indices[None], chosen.sum(-1, dtype=torch.int32)[None], block_size)
