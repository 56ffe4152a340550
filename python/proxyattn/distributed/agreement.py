"""Ranks agree on a call before any of them begins, so that all fail together or none."""

import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from proxyattn.distributed.collectives import device_types, gathered

#: Bytes of what a rank says of its call, whatever it says.
DESCRIPTION_BYTES = 8192
#: A message as long as this still leaves room for everything around it.
_MESSAGE_LENGTH = 1500
_KINDS = {"ValueError": ValueError, "TypeError": TypeError, "RuntimeError": RuntimeError}


@dataclass(frozen=True)
class Description:
    """What a rank says: ``shared`` must be the same everywhere, ``own`` is its own.

    Names to values that JSON knows. ``fault`` is what keeps the rank from the call, if anything.
    """

    shared: dict[str, Any]
    own: dict[str, Any]
    fault: Exception | None = None


def agree(op: str, description: Description, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """Exchanges descriptions; collective, and waits for all ranks.

    Returns:
        ``own`` of every rank.

    Raises:
        ValueError: on all ranks, where ``shared`` differs; names the first such argument and its
            values.
        ValueError, TypeError, RuntimeError: on all ranks, where one has a fault.
    """
    everyone = _exchange(_encoded(op, description), group)
    faults = [(rank, one["fault"]) for rank, one in enumerate(everyone) if one["fault"]]
    if faults:
        # What is wrong in the same way everywhere is said as one process would say it.
        rank, (kind, message) = faults[0]
        alike = len(faults) == len(everyone) and all(fault == faults[0][1] for _, fault in faults)
        where = "" if alike else f"{op}: rank {rank}: "
        raise _KINDS[kind](f"{where}{message}") from description.fault
    for name in everyone[0]["shared"]:
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks.setdefault(json.dumps(one["shared"][name]), []).append(rank)
        if len(ranks) > 1:
            values = " and ".join(
                f"{json.loads(value)} on {_ranks(where)}" for value, where in ranks.items()
            )
            raise ValueError(f"{op}: {name} must be the same on every rank, got {values}")
    return [one["own"] for one in everyone]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _encoded(op: str, description: Description) -> bytes:
    fault = description.fault
    if fault is None:
        try:
            text = json.dumps({**vars(description), "fault": None}).encode()
        except (TypeError, ValueError) as error:  # a value that is none of JSON's
            fault = error
        else:
            if len(text) <= DESCRIPTION_BYTES:
                return text
            fault = ValueError(
                f"{op}: cached must be few enough numbers to send, got {len(text)} bytes of "
                f"arguments where {DESCRIPTION_BYTES} fit"
            )
    kind = next((name for name, kind in _KINDS.items() if isinstance(fault, kind)), "RuntimeError")
    message = str(fault) if type(fault) in _KINDS.values() else f"{type(fault).__name__}: {fault}"
    return json.dumps({"fault": (kind, message[:_MESSAGE_LENGTH])}).encode()


def _exchange(text: bytes, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    types = device_types(group)
    # The host's own memory where the group can, which spares the GPU a wait.
    device = torch.device("cpu") if "cpu" in types else torch.device(types[0], _current(types[0]))
    own = torch.frombuffer(bytearray(text.ljust(DESCRIPTION_BYTES)), dtype=torch.uint8).to(device)
    return [json.loads(bytes(one.tolist())) for one in gathered(own, group).cpu()]


def _current(device_type: str) -> int:
    return torch.get_device_module(device_type).current_device()
