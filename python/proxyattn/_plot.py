"""A picture of what a few heads read, drawn over where their attention lies."""

import torch
from torch import Tensor
from tqdm import tqdm

from proxyattn._demo import Layer
from proxyattn._measure import chosen_blocks, exact_rows
from proxyattn._stages import Settings, StageOutputs, visible_blocks

NUM_HEADS = 4  # drawn: the ones that read least and most, and some between
MAX_ROWS = 128  # query blocks drawn; longer prompts are thinned out
ROWS_PER_BLOCK = 4  # queries of each drawn block whose attention is averaged
CHOSEN_COLOUR = (0.2, 0.9, 0.6, 0.55)  # red, green, blue, opacity
MIN_MASS = 1e-5  # smallest share of attention that the colours tell apart


class PlotError(Exception):
    """The picture can't be drawn, in one sentence."""


def require_matplotlib():
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


def plot_layer(layer: Layer, stages: StageOutputs, settings: Settings, path: str) -> None:
    """Draws the chosen blocks of a few heads over their attention mass, into a PNG file."""
    pyplot = require_matplotlib()
    from matplotlib.colors import LogNorm

    q_len, kv_len = layer.q.shape[1], layer.k.shape[1]
    visible = int(visible_blocks(q_len, kv_len, settings.block_size).sum())
    by_reading = stages.counts[0].sum(1).argsort().tolist()
    picks = torch.linspace(0, len(by_reading) - 1, min(NUM_HEADS, len(by_reading))).long().tolist()
    figure, axes = pyplot.subplots(
        len(picks), 2, figsize=(11, 5 * len(picks)), squeeze=False, layout="constrained"
    )
    extent, norm = (0, kv_len, q_len, 0), LogNorm(vmin=MIN_MASS, vmax=1.0)
    for (left, right), pick in tqdm(
        list(zip(axes, picks, strict=True)), desc="plot", leave=False, disable=None
    ):
        head = by_reading[pick]
        mass, chosen = _head_maps(layer, stages, settings, head)
        share = int(stages.counts[0, head].sum()) / visible
        for axis in (left, right):
            image = axis.imshow(
                mass.clamp(min=MIN_MASS).numpy(),
                norm=norm,
                cmap="magma",
                extent=extent,
                aspect="auto",
            )
            axis.set_xlabel("key token")
            axis.set_ylabel("query token")
        left.set_title(f"head {head}: attention mass of each key block")
        overlay = torch.zeros(*chosen.shape, 4)
        overlay[chosen] = torch.tensor(CHOSEN_COLOUR)
        right.imshow(overlay.numpy(), extent=extent, aspect="auto", interpolation="nearest")
        right.set_title(f"blocks read, {100 * share:.1f} %")
        figure.colorbar(image, ax=[left, right], shrink=0.8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise PlotError(f"--plot {path} can't be written: {error}") from error
    finally:
        pyplot.close(figure)


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
    masses = []
    for step in range(ROWS_PER_BLOCK):  # one row of each block at a time, to save memory
        exact = exact_rows(
            layer.q[0, rows[:, step], head],
            layer.k[0, :, kv_head],
            layer.v[0, :, kv_head],
            rows[:, step],
            chosen,
            block_size,
        )
        masses.append(exact.block_mass)
    return torch.stack(masses).mean(0).float().cpu(), chosen.cpu()
