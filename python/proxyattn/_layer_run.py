"""The main job: sparse prefill of one made-up layer, measured against exact and dense attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from proxyattn._demo import Layer, make_layer
from proxyattn._measure import (
    ExactRows,
    Stopwatch,
    chosen_blocks,
    dense_attention,
    dense_backends,
    exact_rows,
    relative_error,
    sample_rows,
)
from proxyattn._stages import StageOutputs, run_stages, visible_blocks
from proxyattn.settings import Settings

SAMPLED_ROWS = 64
WARM_UP_RUNS = 1
TOTAL = "proxy_attention"  # the single call, among the names of the stages


@dataclass(frozen=True)
class LayerShape:
    """One attention layer, and where it is computed."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Of q, k, v, and of the two outputs that are compared."""
        heads = 3 * self.heads + 2 * self.kv_heads
        return self.length * heads * self.head_dim * self.dtype.itemsize


@dataclass(frozen=True)
class HeadResult:
    """One query head; errors are relative L2 over the sampled rows."""

    need: float  # share in the forced blocks for top_p, budget in blocks for last_block
    read: float  # blocks read of those visible
    kept: float  # mean attention mass in the blocks read, over the sampled rows
    error: float  # sparse output against exact attention
    kernel_error: float  # sparse output against exact attention over the same blocks
    needles: int  # answered by the sparse output


@dataclass(frozen=True)
class SparseResult:
    """One setting."""

    settings: Settings
    heads: list[HeadResult]
    times: dict[str, float]  # milliseconds, by stage and of the single call


@dataclass(frozen=True)
class DenseResult:
    """torch's attention, and exact attention of the sampled rows."""

    times: dict[str, float]  # milliseconds, by backend
    errors: list[float]  # by head, relative L2 against exact attention
    needles: list[int]  # by head, answered by exact attention


@dataclass(frozen=True)
class LayerResult:
    shape: LayerShape
    seed: int
    num_needles: int
    num_rows: int  # sampled
    dense: DenseResult
    sparse: dict[str, SparseResult]  # by name; the first is the one that was asked for


def run_layer(
    shape: LayerShape, settings: dict[str, Settings], seed: int, repeats: int
) -> tuple[LayerResult, Layer, StageOutputs]:
    """Computes, times and checks one layer with each of the settings.

    The stage outputs are those of the first setting.
    """
    layer = make_layer(
        shape.length,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.dtype,
        shape.device,
        seed,
    )
    rows = torch.cat([sample_rows(shape.length, SAMPLED_ROWS, seed), layer.questions.cpu()])
    rows = rows.to(shape.device)
    runs = {}
    with tqdm(total=len(settings) + 1, desc="timing", leave=False, disable=None) as progress:
        for name, setting in settings.items():
            runs[name] = _run_sparse(layer, setting, repeats, rows)
            progress.update(1)
        dense_times, dense_rows = _run_dense(layer, repeats, rows)
        progress.update(1)

    heads = {name: [] for name in settings}
    dense_errors, dense_needles = [], []
    for head in tqdm(range(shape.heads), desc="exact rows", leave=False, disable=None):
        kv_head = head * shape.kv_heads // shape.heads
        keys, values = layer.k[0, :, kv_head], layer.v[0, :, kv_head]
        exact = exact_rows(layer.q[0, rows, head], keys, values, rows)
        dense_errors.append(relative_error(dense_rows[:, head], exact.out))
        dense_needles.append(_answered(exact.out, layer.codes))
        for name, run in runs.items():
            heads[name].append(_check_head(layer, run, settings[name], head, rows, exact))
    sparse = {
        name: SparseResult(setting, heads[name], runs[name].times)
        for name, setting in settings.items()
    }
    dense = DenseResult(dense_times, dense_errors, dense_needles)
    result = LayerResult(shape, seed, len(layer.codes), len(rows), dense, sparse)
    return result, layer, next(iter(runs.values())).stages


@dataclass(frozen=True)
class _SparseRun:
    times: dict[str, float]
    stages: StageOutputs
    out: Tensor  # [R, Hq, D], of the sampled rows, from the single call


def _run_sparse(layer: Layer, settings: Settings, repeats: int, rows: Tensor) -> _SparseRun:
    q, k, v = layer.q, layer.k, layer.v
    for _ in range(WARM_UP_RUNS):
        run_stages(q, k, v, settings)
        settings.attend(q, k, v)
    watch = Stopwatch(q.device)
    for _ in range(repeats):
        stages = run_stages(q, k, v, settings, timed=watch)
        with watch(TOTAL):
            out = settings.attend(q, k, v)
    # Not a second copy of the whole output for every setting.
    stages = stages._replace(out=out[:, :0])
    return _SparseRun(watch.medians(), stages, out[0, rows])


def _run_dense(layer: Layer, repeats: int, rows: Tensor) -> tuple[dict[str, float], Tensor]:
    q, k, v = layer.q, layer.k, layer.v
    watch = Stopwatch(q.device)
    for name, backends in dense_backends(q, k, v).items():
        with sdpa_kernel(backends):
            for _ in range(WARM_UP_RUNS):
                out = dense_attention(q, k, v)
            for _ in range(repeats):
                with watch(name):
                    out = dense_attention(q, k, v)
    return watch.medians(), out[0, rows]


def _check_head(
    layer: Layer, run: _SparseRun, settings: Settings, head: int, rows: Tensor, exact: ExactRows
) -> HeadResult:
    block_size, counts = settings.block_size, run.stages.counts
    length = layer.q.shape[1]
    visible = int(visible_blocks(length, length, block_size).sum())
    chosen = chosen_blocks(run.stages.indices, counts, head, rows // block_size)
    out = run.out[:, head]
    return HeadResult(
        need=float(run.stages.needs[0, head]),
        read=int(counts[0, head].sum()) / visible,
        kept=float(exact.kept(chosen, block_size).mean()),
        error=relative_error(out, exact.out),
        kernel_error=relative_error(out, exact.chosen_out(chosen, block_size)),
        needles=_answered(out, layer.codes),
    )


def _answered(out: Tensor, codes: Tensor) -> int:
    """Questions, the last rows, whose output is closest to their own needle's values, and close."""
    asked = out[-len(codes) :]
    closeness = torch.nn.functional.cosine_similarity(
        asked[:, None].double(), codes[None].double(), dim=2
    )
    best, which = closeness.max(1)
    own = torch.arange(len(codes), device=codes.device)
    return int(((which == own) & (best > 0.5)).sum())
