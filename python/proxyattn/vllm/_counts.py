"""How many rows ran sparse, and how many dense and why."""

import time
from collections import Counter
from collections.abc import Mapping

from proxyattn.vllm._notices import info
from proxyattn.vllm._plan import SPARSE

# Seconds from one log line to the next.
_LOG_EVERY = 60.0

_counts: Counter = Counter()
_logged_at = -_LOG_EVERY
_sparse_when_logged = 0


def counts(worker=None) -> dict[str, int]:
    """How many rows ran sparse, under ``"sparse"``, and how many dense, by the reason.

    A row, the tokens of one request in one step, counts once in each layer, warm-up included. The
    numbers are those of this process; where workers are others, ``llm.collective_rpc(counts)`` asks
    each of them (``VLLM_ALLOW_INSECURE_SERIALIZATION=1`` lets it). The log has them too, once a
    minute while long prompts come.

    Args:
        worker: vLLM's, which ``collective_rpc`` hands over; not looked at.
    """
    return {kind: number for kind, number in _counts.items() if number}


def add(rows: Mapping[str, int], layers: int, dense_layers: Mapping[str, int]) -> None:
    """Counts the rows of a step.

    Args:
        rows: how many there are, by ``"sparse"`` or why they run dense.
        layers: how many layers can run sparse.
        dense_layers: how many can't, by the reason.
    """
    for kind, number in rows.items():
        if kind == SPARSE:
            _counts[SPARSE] += number * layers
            for reason, others in dense_layers.items():
                _counts[reason] += number * others
        else:
            _counts[kind] += number * (layers + sum(dense_layers.values()))
    _log()


def _log() -> None:
    global _logged_at, _sparse_when_logged
    now = time.monotonic()
    if _counts[SPARSE] > _sparse_when_logged and now - _logged_at >= _LOG_EVERY:
        _logged_at, _sparse_when_logged = now, _counts[SPARSE]
        listed = ", ".join(f"{kind} {number}" for kind, number in _counts.most_common())
        info(f"proxyattn: rows times layers so far: {listed}")
