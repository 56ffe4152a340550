"""What ran sparse, and what ran dense and why."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from proxyattn._report import percent, table
from proxyattn._stages import visible_blocks


@dataclass(frozen=True, eq=False, repr=False)
class SparseCall:
    """One layer's sparse attention in one forward pass: of all rows, or of one sequence of a batch
    that is padded or packed."""

    layer: int | None
    q_len: int
    kv_len: int
    block_size: int
    counts: Tensor  # int32 [B, Hq, ceil(q_len / block_size)], key blocks read
    proxy_heads: int

    @property
    def blocks_read(self) -> int:
        """Key blocks read, over all batch entries, heads and query blocks."""
        return int(self.counts.sum())

    @property
    def blocks_visible(self) -> int:
        """Key blocks that dense causal attention would have read."""
        batch, heads, _ = self.counts.shape
        return batch * heads * int(visible_blocks(self.q_len, self.kv_len, self.block_size).sum())

    @property
    def share(self) -> float:
        """Blocks read of those visible, between 0 and 1."""
        return self.blocks_read / max(1, self.blocks_visible)

    @property
    def share_by_head(self) -> Tensor:
        """The same for each query head, float64 ``[Hq]``."""
        visible = visible_blocks(self.q_len, self.kv_len, self.block_size).sum()
        batch = max(1, self.counts.shape[0])
        return self.counts.sum(dim=(0, 2), dtype=torch.float64).cpu() / (batch * visible)

    def __repr__(self) -> str:
        return (
            f"SparseCall(layer={self.layer}, q_len={self.q_len}, kv_len={self.kv_len}, "
            f"share={self.share:.3f})"
        )


@dataclass(eq=False, repr=False)
class Recording:
    """What ran inside a :func:`record` block; prints as a table of layers."""

    sparse: list[SparseCall] = field(default_factory=list)
    #: Calls that read all that they see: how many, by (layer, reason). Those for the reason
    #: "window" ran here, inside a sliding window; the others went to SDPA.
    dense: Counter = field(default_factory=Counter)

    @property
    def share(self) -> float:
        """Blocks read by the sparse calls of those visible to them, between 0 and 1."""
        return _share(self.sparse)

    def __repr__(self) -> str:
        calls: dict[int | None, list[SparseCall]] = {}
        for call in self.sparse:
            calls.setdefault(call.layer, []).append(call)
        reasons: dict[int | None, list[str]] = {}
        for (layer, reason), count in self.dense.items():
            reasons.setdefault(layer, []).append(f"{reason} x{count}")
        layers = sorted({*calls, *reasons}, key=lambda layer: -1 if layer is None else layer)
        if not layers:
            return (
                "nothing recorded: no attention reached proxyattn. Is the model's "
                "attn_implementation the registered name? proxyattn.hf.check_model(model) says "
                "whether its class can use it."
            )
        rows = [
            _row(str(layer), calls.get(layer, []), ", ".join(reasons.get(layer, [])))
            for layer in layers
        ]
        rows.append(_row("all", self.sparse, f"{self.dense.total()} calls" if self.dense else ""))
        # One column per figure, so that another finds its place.
        return table(("layer", "sparse calls", "blocks read", *_HEADS, "dense calls"), rows)


_HEADS = ("least head", "most head")


def _share(calls: list[SparseCall]) -> float:
    visible = sum(call.blocks_visible for call in calls)
    return sum(call.blocks_read for call in calls) / max(1, visible)


def _row(name: str, calls: list[SparseCall], dense: str) -> tuple[str, ...]:
    if not calls:
        return (name, "0", "", "", "", dense)
    least = min(float(call.share_by_head.min()) for call in calls)
    most = max(float(call.share_by_head.max()) for call in calls)
    return (name, str(len(calls)), percent(_share(calls)), percent(least), percent(most), dense)


# Those of this thread and task, the outermost first.
_open: ContextVar[tuple[Recording, ...]] = ContextVar("proxyattn_recordings", default=())
# Those of all threads. torch.compile can't read context variables, but guards on this number.
_num_open = 0
_num_open_lock = Lock()


def _count(change: int) -> None:
    global _num_open
    with _num_open_lock:
        _num_open += change


@contextmanager
def record() -> Iterator[Recording]:
    """Collects which blocks each layer reads, and which calls went to SDPA and why.

    Recordings belong to the thread and task that opened them, and may be nested: each sees all
    calls of its block. While recording, the stages run one by one instead of in one call, so that
    the counts can be seen: results are the same but for rounding, times are not.
    """
    recording = Recording()
    token = _open.set((*_open.get(), recording))
    _count(1)
    try:
        yield recording
    finally:
        _count(-1)
        _open.reset(token)


def open_recordings() -> tuple[Recording, ...]:
    """The recordings that this thread's calls belong to; not for code that is being compiled."""
    return _open.get()


def anything_recorded() -> bool:
    """Whether any thread records, for code that is being compiled."""
    return _num_open > 0


def record_dense(layer: int | None, reason: str) -> None:
    for recording in _open.get():
        recording.dense[layer, reason] += 1
