"""A batch of sequences on many ranks, and what one process makes of the whole."""

from dataclasses import dataclass, field

import proxyattn
import torch
import torch.distributed as dist
from inputs import name_of
from proxyattn.distributed import shard
from proxyattn.distributed.call import prepare
from proxyattn.distributed.layout import Sharding


@dataclass(frozen=True)
class Sharded:
    tokens: int
    heads: tuple  # (q_heads, kv_heads, proxy_heads)
    layout: str = "zigzag"
    batch: int = 1
    cached: tuple = ()  # tokens of earlier calls
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    seed: int = 0
    settings: dict = field(default_factory=dict)

    def __str__(self):
        shape = "x".join(map(str, self.heads))
        before = "+".join(map(str, (*self.cached, self.tokens)))
        settings = "-".join(f"{name}={value}" for name, value in self.settings.items())
        return (
            f"{self.layout}-{self.batch}x{before}-h{shape}-d{self.head_dim}-{name_of(self.dtype)}-"
            f"{settings}"
        )

    @property
    def arguments(self):
        return {"gamma": 0.6, "min_budget": 0, "num_proxy_heads": self.heads[2], **self.settings}

    def whole(self, device="cpu"):
        """q, k, v of all tokens, the same on every rank. Some keys matter more than others."""
        generator = torch.Generator().manual_seed(self.seed)
        length = sum(self.cached) + self.tokens

        def random(tokens, heads):
            shape = (self.batch, tokens, heads, self.head_dim)
            return torch.randn(shape, generator=generator)

        q, k = random(self.tokens, self.heads[0]) * 2, random(length, self.heads[1])
        k *= 0.5 + torch.rand(self.batch, length, self.heads[1], 1, generator=generator)
        return [x.to(self.dtype).to(device) for x in (q, k, random(length, self.heads[1]))]

    def shard(self, x, group, dim=1):
        """This rank's tokens of x, which has those of earlier calls or not."""
        block_size = self.arguments.get("block_size", 64)
        lengths = [*self.cached, self.tokens][-1 if x.shape[dim] == self.tokens else 0 :]
        parts = x.split(lengths, dim)
        options = {"group": group, "layout": self.layout, "block_size": block_size}
        return torch.cat([shard(part, dim, **options) for part in parts], dim)

    def call(self, group, device="cpu"):
        """q, k, v of this rank and what else the call takes."""
        q, k, v = (self.shard(x, group) for x in self.whole(device))
        counted = {}
        if len(self.cached) > 1:
            options = {"group": group, "layout": self.layout}
            counted["cached"] = [len(shard(torch.ones(n), 0, **options)) for n in self.cached]
        return {"q": q, "k": k, "v": v, "group": group, "layout": self.layout, **counted}


def chunks_of(case, group):
    """The chunks of queries of this rank."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    pieces = 2 * world if case.layout == "zigzag" and world > 1 else world
    block = case.arguments.get("block_size", 64)
    chunk = case.tokens if world == 1 else -(-case.tokens // (pieces * block)) * block
    return Sharding(case.layout, world, case.tokens, chunk).of_rank(rank)


def prepare_case(case, call, shares):
    settings = dict(case.arguments)
    named = {name: settings.pop(name) for name in ("causal", "scale") if name in settings}
    return prepare(**call, **named, shares=shares, settings=settings)


def check_lists(case, call, group, shares):
    """Every query block of this rank has the list that it has in one process."""
    q, k, _ = case.whole(call["q"].device)
    want, want_counts = proxyattn.choose_blocks(q, k, **case.arguments, shares=shares)
    agreed = prepare_case(case, call, shares)
    block = agreed.settings.block_size
    chunks = chunks_of(case, group)
    proxy = 0
    for heads, arguments in agreed.groups():
        arguments = {name: value for name, value in arguments.items() if name != "v"}
        indices, counts = proxyattn.choose_blocks_varlen(**arguments)
        proxies = slice(proxy, proxy + len(indices))
        proxy, row = proxies.stop, 0
        for sequence in range(case.batch):
            for chunk in chunks:
                rows = slice(row, row + -(-chunk.length // block))
                first = chunk.start // block
                there = slice(first, first + rows.stop - rows.start)
                expected = want[sequence, proxies, there]
                common = min(expected.shape[2], indices.shape[2])
                assert torch.equal(indices[:, rows, :common], expected[:, :, :common])
                assert (indices[:, rows, common:] == -1).all()
                assert (expected[:, :, common:] == -1).all()
                assert torch.equal(counts[:, rows], want_counts[sequence, heads, there])
                row = rows.stop
    assert proxy == want.shape[1]
