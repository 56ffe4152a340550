"""Pictures: what a few heads of a layer read and miss, and what every head of a model reads."""

from pathlib import Path
from textwrap import fill

import torch
from torch import Tensor
from tqdm import tqdm

from proxyattn._demo import Layer
from proxyattn._measure import chosen_blocks, exact_rows
from proxyattn._model_run import ModelResult
from proxyattn._report import describe, percent, why_not_writable
from proxyattn._stages import StageOutputs, visible_blocks
from proxyattn.settings import Settings

NUM_HEADS = 4  # drawn: the ones that read least and most, and some between
MAX_ROWS = 128  # query blocks drawn; longer prompts are thinned out
ROWS_PER_BLOCK = 4  # queries of each drawn block whose attention is averaged
READ_COLOUR = "#b7d9c3"
MIN_MASS = 1e-5  # smallest share of attention that the colours tell apart


class PlotError(Exception):
    """The picture can't be drawn, in one sentence."""


def check_plot(path: Path) -> None:
    """Raises PlotError unless a picture can be drawn into the file; called before the work."""
    pyplot = _pyplot()
    reason = why_not_writable(path)
    if reason is not None:
        raise PlotError(f"--plot {path} can't be written: {reason}")
    figure = pyplot.figure()
    kinds = sorted(figure.canvas.get_supported_filetypes())
    pyplot.close(figure)
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise PlotError(f"--plot must end in one of {', '.join(kinds)}, got {path}")


def plot_layer(layer: Layer, stages: StageOutputs, settings: Settings, path: Path) -> None:
    """Draws the attention mass of a few heads, and beside it what was read and what was missed."""
    pyplot = _pyplot()
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.patches import Patch

    q_len, kv_len = layer.q.shape[1], layer.k.shape[1]
    heads = _drawn_heads(stages.counts[0])
    visible = int(visible_blocks(q_len, kv_len, settings.block_size).sum())
    figure, axes = pyplot.subplots(
        len(heads), 2, figsize=(11, 5 * len(heads)), squeeze=False, layout="constrained"
    )
    place = {"extent": (0, kv_len, q_len, 0), "aspect": "auto", "interpolation": "nearest"}
    norm = LogNorm(vmin=MIN_MASS, vmax=1.0)
    progress = tqdm(heads, desc="plot", leave=False, disable=None)
    for (left, right), head in zip(axes, progress, strict=True):
        mass, chosen = _head_maps(layer, stages, settings, head)
        hidden = mass == 0
        shown = mass.clamp(min=MIN_MASS).masked_fill(hidden, torch.nan)
        left.imshow(shown.numpy(), norm=norm, cmap="magma_r", **place)
        left.set_title(f"head {head}: attention mass of every key block", fontsize=10)
        missed = shown.masked_fill(chosen, torch.nan)
        read = torch.ones_like(mass).masked_fill(~chosen, torch.nan)
        right.imshow(read.numpy(), cmap=ListedColormap([READ_COLOUR]), **place)
        image = right.imshow(missed.numpy(), norm=norm, cmap="magma_r", **place)
        reads = int(stages.counts[0, head].sum()) / visible
        kept = float((mass * chosen).sum(1).mean())
        right.set_title(
            f"reads {percent(reads)} of the blocks and misses {percent(1 - kept)} of the attention",
            fontsize=10,
        )
        handles = [Patch(color=READ_COLOUR, label="read"), Patch(fill=False, label="else: missed")]
        right.legend(handles=handles, loc="upper right")
        for axis in (left, right):
            axis.set_xlabel("key token")
            axis.set_ylabel("query token")
        figure.colorbar(
            image,
            ax=[left, right],
            shrink=0.8,
            label="attention mass of a key block",
        )
    text = describe(settings, layer.q.shape[2], layer.k.shape[2])
    figure.suptitle(f"{q_len} tokens; {text}", fontsize=9)
    _save(figure, path)


def plot_model(result: ModelResult, path: Path) -> None:
    """Draws which share of the key blocks every head of every sparse layer reads."""
    pyplot = _pyplot()
    name, reading = next(iter(result.sparse.items()))
    by_layer = [layer.call.share_by_head for layer in reading.layers]
    num_heads = max((len(shares) for shares in by_layer), default=0)
    if not num_heads:
        raise PlotError(f"--plot {path} is not drawn: no layer ran sparse")
    # Layers may differ in their heads; what a layer doesn't have stays white.
    shares = torch.full((len(by_layer), num_heads), torch.nan, dtype=torch.float64)
    for row, layer_shares in zip(shares, by_layer, strict=True):
        row[: len(layer_shares)] = layer_shares

    size = (max(6.0, 3 + 0.3 * num_heads), max(4.0, 2 + 0.25 * len(by_layer)))
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    image = axis.imshow(100 * shares.numpy(), cmap="viridis", vmin=0, aspect="auto")
    axis.set_xlabel("query head")
    axis.set_ylabel("layer that ran sparse")
    axis.set_xticks(range(0, num_heads, -(-num_heads // 16)))
    ticks = range(0, len(by_layer), -(-len(by_layer) // 32))
    axis.set_yticks(ticks, [str(reading.layers[tick].call.layer) for tick in ticks])
    figure.colorbar(image, ax=axis, label="blocks read, % of those that dense attention reads")
    settings = describe(result.settings[name], *result.reader.heads)
    axis.set_title(fill(f"{result.reader.about_prompt}; {settings}", 72), fontsize=8)
    _save(figure, path)


def _pyplot():
    """The pyplot module, set up to draw into files."""
    try:
        import matplotlib
    except ImportError as error:
        raise PlotError(
            "--plot needs matplotlib; install it with: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as pyplot

    return pyplot


def _save(figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {path} can't be written: {error}") from error
    finally:
        _pyplot().close(figure)


def _drawn_heads(counts: Tensor) -> list[int]:
    """Heads from the one that reads least to the one that reads most, of int32 ``[Hq, Mb]``."""
    by_reading = counts.sum(1).argsort().tolist()
    picks = torch.linspace(0, len(by_reading) - 1, min(NUM_HEADS, len(by_reading))).long().tolist()
    return [by_reading[pick] for pick in picks]


def _head_maps(
    layer: Layer, stages: StageOutputs, settings: Settings, head: int
) -> tuple[Tensor, Tensor]:
    """Attention mass and chosen blocks, ``[rows drawn, Nb]`` each, on the CPU."""
    length, block_size = layer.q.shape[1], settings.block_size
    num_q_blocks = -(-length // block_size)
    count = min(MAX_ROWS, num_q_blocks)
    device = layer.q.device
    q_blocks = torch.linspace(0, num_q_blocks - 1, count, device=device).round().long()
    steps = (torch.arange(ROWS_PER_BLOCK, device=device) * 2 + 1) * block_size
    rows = q_blocks[:, None] * block_size + steps // (2 * ROWS_PER_BLOCK)
    rows = rows.clamp(max=length - 1)
    chosen = chosen_blocks(stages.indices, stages.counts, head, q_blocks)
    kv_head = head * layer.k.shape[2] // layer.q.shape[2]
    keys, values = layer.k[0, :, kv_head], layer.v[0, :, kv_head]
    masses = []
    for step in range(ROWS_PER_BLOCK):  # one row of each block at a time, to save memory
        exact = exact_rows(layer.q[0, rows[:, step], head], keys, values, rows[:, step])
        masses.append(exact.block_mass(block_size))
    return torch.stack(masses).mean(0).float().cpu(), chosen.cpu()
