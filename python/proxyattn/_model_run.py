"""The main job on a real model: loss, prefill time and blocks read, dense and sparse."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from proxyattn._model import LayerReading, Reader, Reading, load
from proxyattn._report import describe, legend, machine, milliseconds, percent, table
from proxyattn.settings import Settings


@dataclass(frozen=True)
class ModelResult:
    reader: Reader
    min_seqlen: int
    settings: dict[str, Settings]
    dense: Reading
    sparse: dict[str, Reading]  # by name; the first is the one that was asked for


def run_model(
    model_dir: Path,
    text_file: Path,
    length: int,
    dtype: torch.dtype | None,
    device: torch.device,
    settings: dict[str, Settings],
    min_seqlen: int | None,
    repeats: int,
) -> ModelResult:
    """Reads up to ``length`` tokens of the text with dense attention and with each setting."""
    reader = load(model_dir, text_file, length, dtype, device)
    from proxyattn import hf  # after load, which says when transformers is missing

    sparse = {}
    with tqdm(total=len(settings) + 1, desc="prefill", leave=False, disable=None) as progress:
        dense = reader.dense(repeats)
        progress.update(1)
        for name, setting in settings.items():
            hf.register("proxyattn", min_seqlen=min_seqlen, **setting.to_dict())
            sparse[name] = reader.sparse("proxyattn", repeats)
            progress.update(1)
    least = hf.MIN_SEQLEN[device.type] if min_seqlen is None else min_seqlen
    return ModelResult(reader, least, settings, dense, sparse)


def model_report(result: ModelResult) -> str:
    """The result as text."""
    name, asked = next(iter(result.sparse.items()))
    parts = [_header(result), layer_table(asked, f"layers, {name}")]
    if any(reading.layers for reading in result.sparse.values()):
        parts.append(_comparison(result))
    return "\n\n".join([*parts, *_remarks(result)])


def header(reader: Reader, lines: dict[str, str]) -> str:
    """What ran on what, and lines of the caller's."""
    dtype = str(reader.model.dtype).removeprefix("torch.")
    about = {"model": f"{reader.about_model}, {dtype}", "prompt": reader.about_prompt}
    return f"{machine(reader.ids.device)}\n{legend(about | lines)}"


def _header(result: ModelResult) -> str:
    heads = result.reader.heads
    lines = {name: describe(settings, *heads) for name, settings in result.settings.items()}
    return header(result.reader, lines)


def layer_table(reading: Reading, title: str) -> str:
    """What each layer reads and keeps, or why it ran dense."""
    rows = [_layer_row(layer) for layer in reading.layers]
    rows += [(str(layer), f"dense: {reason}", "", "", "", "") for layer, reason in reading.dense]
    headers = ("layer", "blocks read", "least head", "most head", "kept", "least head")
    meanings = {
        "blocks read": "of the key blocks that dense attention reads, mean, least and most of the "
        "heads",
        "kept": "attention that lies in the blocks read, median and least of the heads",
    }
    return f"{title}\n{table(headers, rows)}\n{legend(meanings)}"


def _layer_row(layer: LayerReading) -> tuple[str, ...]:
    by_head = layer.call.share_by_head
    figures = (layer.call.share, by_head.min(), by_head.max(), median(layer.kept), layer.kept.min())
    return (str(layer.call.layer), *(percent(float(figure)) for figure in figures))


def median(x: Tensor) -> Tensor:
    """The middle value; the mean of the two in the middle where there are two."""
    return x.quantile(0.5)


def _comparison(result: ModelResult) -> str:
    dense = result.dense
    rows = []
    for name, reading in result.sparse.items():
        if reading.layers:
            kept = torch.stack([layer.kept.mean() for layer in reading.layers])
            rows.append(
                (
                    name,
                    f"{reading.loss:.4f}",
                    f"{reading.loss - dense.loss:+.4f}",
                    percent(reading.share),
                    percent(float(kept.mean())),
                    milliseconds(reading.milliseconds),
                    f"{dense.milliseconds / reading.milliseconds:.2f}x",
                )
            )
    rows.append(
        (
            "torch dense",
            f"{dense.loss:.4f}",
            "",
            percent(1.0),
            percent(1.0),
            milliseconds(dense.milliseconds),
            "1.00x",
        )
    )
    headers = ("attention", "loss", "over dense", "blocks read", "kept", "prefill ms", "speed-up")
    meanings = {
        "loss": "nats per token of the prompt",
        "blocks read": "and kept: means over the layers that ran sparse",
        "speed-up": "of the prefill of the whole model, without its output logits",
    }
    return f"comparison\n{table(headers, rows)}\n{legend(meanings)}"


def _remarks(result: ModelResult) -> list[str]:
    """What the reader of the tables should know about this prompt."""
    length = result.reader.ids.shape[1]
    remarks = []
    if not next(iter(result.sparse.values())).layers:
        remarks.append("no layer ran sparse, so that there is nothing to compare")
    if length < result.min_seqlen:
        remarks.append(
            f"the prompt is shorter than min_seqlen, {result.min_seqlen} tokens here, from which "
            "on register() lets layers run sparse; --min-seqlen 1 shows what they would do"
        )
    for name, settings in result.settings.items():
        if length <= settings.resolved_min_budget:
            remarks.append(
                f"{name}: the prompt is within min_budget, {settings.resolved_min_budget} tokens, "
                "so that every head reads all of it"
            )
    return remarks
