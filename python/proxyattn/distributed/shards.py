"""Cutting a tensor of whole sequences into the shards of ranks, and putting it together again."""

import torch
import torch.distributed as dist
from torch import Tensor

from proxyattn.distributed.collectives import gathered
from proxyattn.distributed.layout import check_layout, even_sharding, sharding_of
from proxyattn.ops import DEFAULT_BLOCK_SIZE


def shard(
    x: Tensor,
    dim: int = 1,
    *,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
    block_size: int = DEFAULT_BLOCK_SIZE,
) -> Tensor:
    """This rank's tokens of x: its chunks one behind another.

    Chunks are as short as may be, of whole blocks, and only the last of the sequence is shorter.
    Nothing is exchanged.

    Args:
        x: tokens of whole sequences along ``dim``, any dtype and device; alike on every rank.
        dim: the dimension of tokens.
        group: the default group if None.
        layout: as in :func:`context_parallel_attention`.
        block_size: tokens that chunks are a multiple of: that of the attention, or 128, which suits
            both of its sizes.

    Returns:
        A tensor of its own, contiguous.

    Raises:
        ValueError: for an unknown layout, and where there are too few tokens for such chunks; with
            the next length that is enough.
    """
    check_layout("shard", layout)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    sharding = even_sharding("shard", x.shape[dim], world, layout, block_size)
    return torch.cat(
        [x.narrow(dim, chunk.start, chunk.length) for chunk in sharding.of_rank(rank)], dim
    )


def unshard(
    x: Tensor,
    dim: int = 1,
    *,
    group: dist.ProcessGroup | None = None,
    layout: str = "zigzag",
) -> Tensor:
    """The whole sequences on every rank; collective.

    Args:
        x: this rank's shard, as :func:`shard` gives it or :func:`context_parallel_attention` its
            outputs.
        dim: the dimension of tokens; 2 for ``lse``.
        group: the default group if None.
        layout: as in :func:`context_parallel_attention`.

    Returns:
        A new tensor, contiguous.

    Raises:
        ValueError: for an unknown layout or where the shards are not of one.
    """
    check_layout("unshard", layout)
    group = dist.group.WORLD if group is None else group
    tokens = x.movedim(dim, 0)
    lengths = gathered(torch.tensor([len(tokens)], device=x.device), group).flatten().tolist()
    sharding = sharding_of("unshard", "x", lengths, layout)
    padded = tokens.new_zeros(max(lengths), *tokens.shape[1:])
    padded[: len(tokens)] = tokens
    everyone = gathered(padded, group)
    parts = [everyone[chunk.rank, chunk.local_tokens] for chunk in sharding.chunks]
    return torch.cat(parts).movedim(0, dim).contiguous()
