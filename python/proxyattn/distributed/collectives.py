"""The few collective calls, in whatever way the installed torch spells them."""

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 renames it and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def device_types(group: dist.ProcessGroup) -> list[str]:
    """The devices whose tensors the group exchanges."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    return [pair.split(":")[0] for pair in config.split(",")]


def all_gather(out: Tensor, own: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Begins to fill ``out [W, ...]`` with every rank's ``own``, which may be its place there.

    Bytes travel, so that no backend need know the dtype. ``wait()`` makes the current stream, or on
    CPUs the caller, wait.
    """
    return _all_gather(
        out.view(-1).view(torch.uint8), own.reshape(-1).view(torch.uint8), group, async_op=True
    )


def gathered(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[W, ...]``: every rank's tensor of this shape and dtype."""
    out = own.new_empty(dist.get_world_size(group), *own.shape)
    all_gather(out, own, group).wait()
    return out
