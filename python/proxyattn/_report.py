"""Plain text: tables, numbers, and what was run on what."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

import proxyattn
from proxyattn.settings import Settings


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first aligned left, the others right."""
    lines = [list(headers), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    text = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        text.append("  ".join(cells).rstrip())
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def legend(entries: dict[str, str]) -> str:
    """Names and what they stand for, one a line."""
    width = max(len(name) for name in entries)
    return "\n".join(f"  {name.ljust(width)}  {meaning}" for name, meaning in entries.items())


def why_not_writable(path: Path) -> str | None:
    """Why a file can't be written, in a few words, to be asked before the work; None if it can."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    if path.is_dir():
        return "it is a folder"
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return "writing there is not permitted"
    return None


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def milliseconds(ms: float) -> str:
    return f"{ms:.3f}" if ms < 100 else f"{ms:.1f}"


def machine(device: torch.device) -> str:
    """Versions and device, one line."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU, {torch.get_num_threads()} threads"
    return f"proxyattn {proxyattn.__version__}, torch {torch.__version__}, {name}"


def describe(settings: Settings, q_heads: int, kv_heads: int) -> str:
    """All settings of a layer of so many heads, defaults filled in, one line."""
    settings = settings.resolve(q_heads, kv_heads)
    return (
        f"{settings.budget_mode}, gamma {settings.gamma:g}, pooling {settings.pooling}, "
        f"stride {settings.stride}, block_size {settings.block_size}, "
        f"num_proxy_heads {settings.num_proxy_heads}, min_budget {settings.min_budget} tokens, "
        f"{settings.num_sink_blocks} sink and {settings.num_local_blocks} local block(s)"
    )
