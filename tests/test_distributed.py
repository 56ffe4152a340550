"""Context parallel attention over gloo: what one process gives for the whole sequences."""

import proxyattn
import pytest
import torch
from inputs import DTYPES, balanced
from proxyattn.distributed import context_parallel_attention, unshard
from sharded import Sharded, check_lists
from tolerance import assert_same_bits

WORLDS = (1, 2, 3, 4)


def check(group, case):
    """For given shares: the lists, the output and the log-sum-exp of one process."""
    q, k, v = case.whole()
    shares = torch.rand(case.batch, case.heads[0]) * 0.3
    settings = {**case.arguments, "shares": shares}
    want = proxyattn.proxy_attention(q, k, v, **settings, return_lse=True)
    call = case.call(group)
    out, lse = context_parallel_attention(**call, **settings, return_lse=True)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    # Bit for bit on CPUs, where fp32 would do within 1e-6.
    assert_same_bits(out, case.shard(want[0], group), "out")
    assert_same_bits(lse, case.shard(want[1], group, 2), "lse")
    if settings["gamma"] < 1:
        check_lists(case, call, group, shares)
    alone = context_parallel_attention(**call, **settings)
    assert_same_bits(alone, out, "once more, without lse")
    options = {"group": group, "layout": case.layout}
    assert_same_bits(unshard(out, **options), want[0].contiguous(), "out, unsharded")
    assert_same_bits(unshard(lse, 2, **options), want[1].contiguous(), "lse, unsharded")


def cases(count, seed):
    axes = {
        "world": WORLDS[1:],
        "layout": ("zigzag", "zigzag", "contiguous"),
        "blocks": (1, 1, 2),  # of a chunk
        "short": (0, 1, 17, 63, 64),  # tokens that the last chunk lacks
        "batch": (1, 1, 2, 3),
        "heads": ((4, 4, 4), (4, 2, 1), (8, 2, 4), (8, 4, 2), (6, 2, 2), (12, 3, 6)),
        "cached": ((), (), "one", "two"),
        "head_dim": (64, 64, 128),
        "dtype": (torch.float32, *DTYPES),
        "causal": (True, True, True, False),
        "block_size": (64, 64, 128),
        "stride": (1, 4, 4, 8),
        "pooling": ("mean", "mean", "first"),
        "gamma": (0.5, 0.7, 0.9, 1.0),
        "num_sink_blocks": (0, 1, 2),
        "num_local_blocks": (0, 1, 1, 3),
    }
    made = []
    for i, values in enumerate(balanced(axes, count, seed)):
        pieces = values["world"] * (2 if values["layout"] == "zigzag" else 1)
        chunk = values["blocks"] * values["block_size"]
        before = {
            "one": (2 * chunk * pieces - 48,),
            "two": (chunk * pieces, values["block_size"] * pieces),
        }
        names = ("causal", "block_size", "stride", "pooling", "gamma")
        names = (*names, "num_sink_blocks", "num_local_blocks")
        case = Sharded(
            tokens=chunk * pieces - values["short"],
            heads=values["heads"],
            layout=values["layout"],
            batch=values["batch"],
            cached=before.get(values["cached"], ()),
            head_dim=values["head_dim"],
            dtype=values["dtype"],
            seed=seed + i,
            settings={name: values[name] for name in names},
        )
        made.append((values["world"], case))
    return made


@pytest.mark.parametrize(("world", "case"), cases(36, 100), ids=str)
def test_of_one_process(ranks, world, case):
    ranks.run(world, check, case)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), cases(300, 1000), ids=str)
def test_sweep(ranks, world, case):
    ranks.run(world, check, case)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_one_rank(ranks, layout):
    """Of any length: there is nothing to align."""
    for tokens in (1, 63, 300):
        ranks.run(1, check, Sharded(tokens, (4, 2, 2), layout, cached=(112,)))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [2, 4])
def test_a_last_chunk_of_nothing(ranks, layout, world):
    pieces = world * (2 if layout == "zigzag" else 1)
    ranks.run(world, check, Sharded(64 * (pieces - 1), (4, 2, 2), layout))
    ranks.run(world, check, Sharded(64 * (pieces - 1) + 1, (4, 2, 2), layout))


def test_a_group_of_some(ranks):
    """Ranks are those of the group, and others have nothing to do with it."""
    ranks.run([1, 3], check, Sharded(250, (4, 2, 2)))
    ranks.run([3, 1, 2], check, Sharded(360, (4, 2, 2), cached=(768,)))


def empty(group):
    for batch, tokens in ((0, 256), (2, 0)):
        q, k = torch.empty(batch, tokens // 2, 4, 64), torch.empty(batch, tokens // 2, 2, 64)
        out, lse = context_parallel_attention(q, k, k, group=group, return_lse=True)
        assert out.shape == q.shape and lse.shape == (batch, 4, tokens // 2)


def test_empty(ranks):
    ranks.run(2, empty)


def any_layout(group):
    case = Sharded(500, (4, 2, 2), batch=2, cached=(256,))
    call = case.call(group)
    want = context_parallel_attention(**call, **case.arguments)
    for name in "qkv":
        x = call[name]
        heads_first = x.transpose(1, 2).contiguous().transpose(1, 2)
        padded = torch.full((*x.shape[:2], 6, 72), torch.nan)[:, :, 1 : 1 + x.shape[2], :64]
        for other in (heads_first, padded.copy_(x)):
            got = context_parallel_attention(**{**call, name: other}, **case.arguments)
            assert_same_bits(got, want, name)


def test_any_memory_layout(ranks):
    ranks.run(2, any_layout)


def compiled(group):
    """The call is left out of the graph as a whole."""
    case = Sharded(500, (4, 2, 2))
    call = case.call(group)

    def layer(q, k, v):
        return context_parallel_attention(
            2 * q, k, v, group=group, layout=case.layout, **case.arguments
        ).sum(-1)

    tensors = [call[name] for name in "qkv"]
    torch._dynamo.reset()
    assert_same_bits(torch.compile(layer, backend="eager")(*tensors), layer(*tensors))


def test_compiled(ranks):
    ranks.run(2, compiled)


def nothing_else_is_read(group):
    """Memory that nobody wrote holds NaN: the room behind a shorter shard."""
    torch.use_deterministic_algorithms(True)
    try:
        for layout, tokens in (("zigzag", 64 * 5 + 1), ("contiguous", 64 * 2 + 1)):
            case = Sharded(tokens, (4, 2, 2), layout, cached=(64 * 6 - 48,))
            out = context_parallel_attention(**case.call(group), **case.arguments)
            assert out.isfinite().all()
            check(group, case)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_else_is_read(ranks):
    ranks.run(3, nothing_else_is_read)


def prefill_in_calls(group, layout):
    """A prompt call by call, every rank keeping what it had: for given shares what one call over
    one process gives."""
    lengths = (512, 256, 500)
    case = Sharded(sum(lengths), (4, 2, 2), layout)
    q, k, v = case.whole()
    settings = {**case.arguments, "shares": torch.full((1, 4), 0.1)}
    want = proxyattn.proxy_attention(q, k, v, **settings)
    caches, cached, done = [[], []], [], 0
    for length in lengths:
        part = Sharded(length, case.heads, layout)
        mine = [part.shard(x[:, done : done + length], group) for x in (q, k, v)]
        for cache, new in zip(caches, mine[1:], strict=True):
            cache.append(new)
        out = context_parallel_attention(
            mine[0],
            *(torch.cat(cache, 1) for cache in caches),
            group=group,
            layout=layout,
            cached=cached,
            **settings,
        )
        assert_same_bits(out, part.shard(want[:, done : done + length], group))
        cached.append(mine[0].shape[1])
        done += length


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_prefill_in_calls(ranks, layout):
    ranks.run(2, prefill_in_calls, layout)
