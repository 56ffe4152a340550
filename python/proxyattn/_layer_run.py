"""The main job: sparse prefill of one made-up layer, measured against exact and dense attention."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

import proxyattn
from proxyattn._demo import Layer, make_layer
from proxyattn._measure import (
    Stopwatch,
    chosen_blocks,
    dense_attention,
    dense_backends,
    exact_rows,
    relative_error,
    sample_rows,
)
from proxyattn._report import milliseconds, percent, table
from proxyattn._stages import STAGES, Settings, StageOutputs, run_stages, visible_blocks

SAMPLED_ROWS = 64
WARM_UP_RUNS = 1


@dataclass(frozen=True)
class LayerShape:
    """One attention layer, and where it is computed."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.length} tokens, {self.heads} query heads, {self.kv_heads} kv heads, "
            f"head_dim {self.head_dim}, {dtype}"
        )


@dataclass(frozen=True)
class HeadResult:
    """One query head; errors are relative L2 over the sampled rows."""

    budget: int  # key blocks
    share: float  # blocks read of those visible
    kept: float  # mean attention mass in the blocks read, over the sampled rows
    error: float  # sparse output against exact attention
    dense_error: float  # torch's dense output against exact attention
    kernel_error: float  # sparse output against exact attention over the same blocks
    needles: int  # answered by the sparse output
    dense_needles: int  # answered by exact attention


@dataclass(frozen=True)
class LayerResult:
    shape: LayerShape
    settings: Settings
    heads: list[HeadResult]
    num_needles: int
    num_rows: int
    times: dict[str, float]  # milliseconds, by stage; "total" is the single call
    dense_times: dict[str, float]  # milliseconds, by backend


def run_layer(
    shape: LayerShape, settings: Settings, seed: int, repeats: int
) -> tuple[LayerResult, Layer, StageOutputs]:
    """Computes, times and checks one layer."""
    layer = make_layer(
        shape.length,
        shape.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.dtype,
        shape.device,
        seed,
    )
    with tqdm(total=3, desc="times", leave=False, disable=None) as progress:
        times, stages, out = _time_sparse(layer, settings, repeats)
        progress.update(2)
        dense_times, dense_out = _time_dense(layer, repeats)
        progress.update(1)

    rows = torch.cat([sample_rows(shape.length, SAMPLED_ROWS, seed), layer.questions.cpu()])
    rows = rows.to(shape.device)
    visible = visible_blocks(shape.length, shape.length, settings.block_size).sum()
    heads = []
    for head in tqdm(range(shape.heads), desc="exact rows", leave=False, disable=None):
        read = stages.counts[0, head].sum()
        heads.append(
            _check_head(
                layer,
                stages,
                settings,
                head,
                rows,
                (out[0, rows, head], dense_out[0, rows, head]),
                float(read / visible),
            )
        )
    result = LayerResult(shape, settings, heads, len(layer.codes), len(rows), times, dense_times)
    return result, layer, stages


def _time_sparse(
    layer: Layer, settings: Settings, repeats: int
) -> tuple[dict[str, float], StageOutputs, Tensor]:
    q, k, v = layer.q, layer.k, layer.v
    for _ in range(WARM_UP_RUNS):
        run_stages(q, k, v, settings)
        out = settings.attend(q, k, v)
    watch = Stopwatch(q.device)
    for _ in range(repeats):
        stages = run_stages(q, k, v, settings, timed=watch)
        with watch("total"):
            out = settings.attend(q, k, v)
    return watch.medians(), stages, out


def _time_dense(layer: Layer, repeats: int) -> tuple[dict[str, float], Tensor]:
    q, k, v = layer.q, layer.k, layer.v
    watch = Stopwatch(q.device)
    for name, backends in dense_backends(q, k, v).items():
        with sdpa_kernel(backends):
            for _ in range(WARM_UP_RUNS):
                out = dense_attention(q, k, v)
            for _ in range(repeats):
                with watch(name):
                    out = dense_attention(q, k, v)
    return watch.medians(), out


def _check_head(
    layer: Layer,
    stages: StageOutputs,
    settings: Settings,
    head: int,
    rows: Tensor,
    outputs: tuple[Tensor, Tensor],
    share: float,
) -> HeadResult:
    kv_head = head * layer.k.shape[2] // layer.q.shape[2]
    chosen = chosen_blocks(stages.indices, stages.counts, head, rows // settings.block_size)
    exact = exact_rows(
        layer.q[0, rows, head],
        layer.k[0, :, kv_head],
        layer.v[0, :, kv_head],
        rows,
        chosen,
        settings.block_size,
    )
    sparse_out, dense_out = outputs
    asked = len(layer.codes)
    return HeadResult(
        budget=int(stages.budgets[0, head]),
        share=share,
        kept=float(exact.kept.mean()),
        error=relative_error(sparse_out, exact.out),
        dense_error=relative_error(dense_out, exact.out),
        kernel_error=relative_error(sparse_out, exact.chosen_out),
        needles=_answered(sparse_out[-asked:], layer.codes),
        dense_needles=_answered(exact.out[-asked:], layer.codes),
    )


def _answered(out: Tensor, codes: Tensor) -> int:
    """Questions whose output is closest to their own needle's values, and close to them at all."""
    closeness = torch.nn.functional.cosine_similarity(
        out[:, None].double(), codes[None].double(), dim=2
    )
    best, which = closeness.max(1)
    own = torch.arange(len(codes), device=codes.device)
    return int(((which == own) & (best > 0.5)).sum())


# ---- the report


def layer_report(result: LayerResult) -> str:
    """The result as text."""
    parts = [
        _header(result),
        _head_table(result),
        _time_table(result),
        _summary(result),
    ]
    return "\n\n".join(parts)


def _header(result: LayerResult) -> str:
    shape, settings = result.shape, result.settings
    on_gpu = shape.device.type == "cuda"
    device = torch.cuda.get_device_name(shape.device) if on_gpu else "CPU"
    threads = "" if on_gpu else f", {torch.get_num_threads()} threads"
    proxy_heads = settings.num_proxy_heads or shape.kv_heads
    return (
        f"proxyattn {proxyattn.__version__}, torch {torch.__version__}, {device}{threads}\n"
        f"layer     {shape}\n"
        f"settings  gamma {settings.gamma:g}, {settings.budget_mode}, stride {settings.stride}, "
        f"block_size {settings.block_size}, {proxy_heads} proxy heads, "
        f"min_budget {settings.resolved_min_budget} tokens"
    )


def _head_table(result: LayerResult) -> str:
    rows = [
        (
            str(index),
            str(head.budget),
            percent(head.share),
            percent(head.kept),
            f"{head.error:.4f}",
            f"{head.needles} of {result.num_needles}",
            f"{head.dense_needles} of {result.num_needles}",
        )
        for index, head in enumerate(result.heads)
    ]
    headers = ("head", "budget", "blocks read", "mass kept", "error", "needles", "dense needles")
    return table(headers, rows)


def _time_table(result: LayerResult) -> str:
    times = result.times
    summed = sum(times[stage] for stage in STAGES)
    rows = [(stage, milliseconds(times[stage]), percent(times[stage] / summed)) for stage in STAGES]
    rows.append(("all in one call", milliseconds(times["total"]), ""))
    rows += [(f"torch dense, {name}", milliseconds(ms), "") for name, ms in _dense(result)]
    return table(("time", "ms", "share"), rows)


def _dense(result: LayerResult) -> list[tuple[str, float]]:
    return sorted(result.dense_times.items(), key=lambda item: item[1])


def _summary(result: LayerResult) -> str:
    heads = result.heads
    backend, dense_ms = _dense(result)[0]
    possible = sum(head.dense_needles for head in heads)
    found = sum(head.needles for head in heads)

    def mean(name: str) -> float:
        return sum(getattr(head, name) for head in heads) / len(heads)

    return (
        f"blocks read   {percent(mean('share'))} of those dense attention reads\n"
        f"mass kept     {percent(mean('kept'))} of exact attention, at {result.num_rows} sampled "
        f"rows\n"
        f"error         {mean('error'):.4f} relative L2 against exact rows in float64 (torch dense "
        f"{mean('dense_error'):.1e}; this kernel on its own blocks {mean('kernel_error'):.1e})\n"
        f"needles       {found} answered by sparse attention, {possible} by exact attention, of "
        f"{len(heads) * result.num_needles}\n"
        f"speed-up      {dense_ms / result.times['total']:.2f}x over torch's dense attention "
        f"({backend})"
    )
