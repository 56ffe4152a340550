"""Keys and values of all ranks, gathered a group of heads at a time: while one group is attended
to, the next is on its way."""

import torch
import torch.distributed as dist
from torch import Tensor

from proxyattn.distributed.collectives import all_gather

#: Of a group's keys and values on all ranks, at least: within a host they arrive in a fifth of a
#: millisecond, about what the launches of its attention take.
WORTHWHILE_BYTES = 64 << 20
#: Groups that are there at a time: one that is read and one that arrives.
_GROUPS_AT_A_TIME = 2


def group_heads(
    op: str, kv_heads: int, unit: int, head_bytes: int, max_gather_bytes: int | None
) -> int:
    """Kv heads that are gathered at a time, a multiple of ``unit``: as few as are worthwhile, so
    that little is gathered before attention can begin, and no more than memory is allowed for.

    Raises:
        ValueError: where the fewest are too many.
    """

    def bytes_of(heads):
        return min(_GROUPS_AT_A_TIME * heads, kv_heads) * head_bytes

    heads = unit
    if max_gather_bytes is not None and bytes_of(heads) > max_gather_bytes:
        raise ValueError(
            f"{op}: max_gather_bytes must be at least {bytes_of(heads)}, got {max_gather_bytes}"
        )
    while heads < kv_heads and heads * head_bytes < WORTHWHILE_BYTES:
        if max_gather_bytes is not None and bytes_of(heads + unit) > max_gather_bytes:
            break
        heads += unit
    return heads


class Gather:
    """Gathers ``k, v [B, tokens, Hkv, D]`` of every rank, padded to ``capacity`` tokens.

    ``start`` and ``wait`` are called for one group of heads after another; what ``wait`` returns is
    valid until the second ``start`` after it.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        heads: int,
        capacity: int,
        page: int,
        process_group: dist.ProcessGroup,
    ):
        self._k, self._v, self._page, self._process_group = k, v, page, process_group
        self.groups = [
            slice(begin, min(begin + heads, k.shape[2])) for begin in range(0, k.shape[2], heads)
        ]
        batch, head_dim = k.shape[0], k.shape[3]
        self._shape = (dist.get_world_size(process_group), 2, batch, capacity)
        head_size = dist.get_world_size(process_group) * 2 * batch * capacity * head_dim
        self._room = [
            k.new_empty(head_size * (group.stop - group.start))
            for group in self.groups[:_GROUPS_AT_A_TIME]
        ]
        self._works: dict[int, dist.Work] = {}

    def _buffer(self, i: int) -> Tensor:
        """[W, 2, B, capacity, heads, D]"""
        heads = self.groups[i].stop - self.groups[i].start
        shape = (*self._shape, heads, self._k.shape[3])
        return self._room[i % _GROUPS_AT_A_TIME][: torch.Size(shape).numel()].view(shape)

    def start(self, i: int) -> None:
        """Sends the i-th group, if there is one."""
        if i >= len(self.groups):
            return
        buffer = self._buffer(i)
        # Each rank's tokens lie where the gather would put them: no second copy of them.
        own = buffer[dist.get_rank(self._process_group)]
        for place, tensor in zip(own, (self._k, self._v), strict=True):
            place[:, : tensor.shape[1]].copy_(tensor[:, :, self.groups[i]])
        self._works[i] = all_gather(buffer, own, self._process_group)

    def wait(self, i: int) -> tuple[Tensor, Tensor]:
        """``k, v [pages, page, heads, D]`` of the i-th group: one block table serves both, as the
        values are the same pages of a memory that begins later."""
        self._works.pop(i).wait()
        buffer = self._buffer(i)
        heads, head_dim = buffer.shape[4:]
        pages = buffer.view(-1, self._page, heads, head_dim)
        to_values = buffer[0, 0].numel() // (self._page * heads * head_dim)
        return pages[:-to_values], pages[to_values:]
