"""Tensor parallel: heads on different ranks, which know nothing of each other; alone and together
with context parallel."""

import proxyattn
import pytest
import torch
import torch.distributed as dist
from proxyattn.distributed import context_parallel_attention
from sharded import Sharded
from tolerance import assert_same_bits


def heads_of(x, part, parts):
    size = x.shape[2] // parts
    return x[:, :, part * size : (part + 1) * size]


def tensor_parallel(group, case):
    """Each rank takes its heads and its part of the proxies: what one process gives for them."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    whole = case.whole()
    settings = case.arguments
    want = proxyattn.proxy_attention(*whole, **settings)
    want_lists, want_counts = proxyattn.choose_blocks(*whole[:2], **settings)
    mine = [heads_of(x, rank, world) for x in whole]
    settings["num_proxy_heads"] //= world
    lists, counts = proxyattn.choose_blocks(*mine[:2], **settings)
    proxies = slice(rank * lists.shape[1], (rank + 1) * lists.shape[1])
    assert torch.equal(lists, want_lists[:, proxies])
    assert torch.equal(counts, want_counts[:, rank * counts.shape[1] :][:, : counts.shape[1]])
    out = proxyattn.proxy_attention(*mine, **settings)
    everyone = [torch.empty_like(out) for _ in range(world)]
    dist.all_gather(everyone, out, group=group)
    assert_same_bits(torch.cat(everyone, 2), want)


@pytest.mark.parametrize("heads", [(8, 4, 2), (8, 4, 4), (8, 2, 4)], ids=str)
def test_tensor_parallel(ranks, heads):
    ranks.run(2, tensor_parallel, Sharded(500, heads, batch=2))


def proxy_of_its_own(group):
    """One proxy of all heads is one of each rank's heads here: other lists, each for its heads."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    case = Sharded(1000, (8, 2, 1))
    q, k, _ = case.whole()
    of_all, _ = proxyattn.choose_blocks(q, k, **case.arguments)
    mine, _ = proxyattn.choose_blocks(*(heads_of(x, rank, world) for x in (q, k)), **case.arguments)
    of_each, _ = proxyattn.choose_blocks(q, k, **{**case.arguments, "num_proxy_heads": world})
    assert torch.equal(mine, of_each[:, rank : rank + 1])
    assert not torch.equal(mine, of_all)


def test_a_proxy_whose_heads_lie_on_two_ranks(ranks):
    ranks.run(2, proxy_of_its_own)


def both(_group, case):
    """Ranks 0 and 1 share the sequence of the first half of the heads, 2 and 3 that of the rest."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    part = dist.get_rank() // 2
    q, k, v = whole = case.whole()
    shares = torch.full((case.batch, q.shape[2]), 0.2)
    want = proxyattn.proxy_attention(*whole, **case.arguments, shares=shares)
    settings = {**case.arguments, "num_proxy_heads": case.heads[2] // 2}
    out = context_parallel_attention(
        *(case.shard(heads_of(x, part, 2), groups[part]) for x in (q, k, v)),
        group=groups[part],
        shares=shares[:, : q.shape[2] // 2],
        **settings,
    )
    assert_same_bits(out, case.shard(heads_of(want, part, 2), groups[part]))


def test_both_at_once(ranks):
    ranks.run(4, both, Sharded(500, (8, 4, 4), batch=2))
