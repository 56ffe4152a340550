"""What context parallel attention is made of: chunks, shares, gathers, shards."""

import proxyattn
import pytest
import torch
import torch.distributed as dist
from inputs import name_of
from packs import PAGES
from proxyattn.distributed import (
    attention,
    context_parallel_attention,
    gather,
    shard,
    shares,
    unshard,
)
from proxyattn.distributed.layout import Sharding, even_sharding, sharding_of
from proxyattn.distributed.pages import PAGE_SIZES, Tokens
from ranks import error_of
from sharded import Sharded, prepare_case
from tolerance import assert_same_bits

# ---- chunks


def test_chunks_by_hand():
    zigzag = Sharding("zigzag", 2, 250, 64)
    assert [(c.rank, c.start, c.offset, c.length) for c in zigzag.chunks] == [
        (0, 0, 0, 64),
        (1, 64, 0, 64),
        (1, 128, 64, 64),
        (0, 192, 64, 58),
    ]
    assert zigzag.lengths == [122, 128]
    contiguous = Sharding("contiguous", 3, 150, 64)
    assert [(c.rank, c.start, c.offset, c.length) for c in contiguous.chunks] == [
        (0, 0, 0, 64),
        (1, 64, 0, 64),
        (2, 128, 0, 22),
    ]
    assert contiguous.lengths == [64, 64, 22]
    assert Sharding("zigzag", 1, 77, 77).lengths == [77]


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_lengths_tell_the_chunks(layout, world):
    """Every sharding that there may be is the only one with its lengths."""
    pieces = world * 2 if layout == "zigzag" else world
    seen = set()
    for chunk in (1, 2, 16, 64, 65):
        for total in range((pieces - 1) * chunk, pieces * chunk + 1):
            one = Sharding(layout, world, total, total if world == 1 else chunk)
            found = sharding_of("op", "q", one.lengths, layout)
            assert [c for c in found.chunks if c.length] == [c for c in one.chunks if c.length]
            seen.add(tuple(one.lengths))
    assert len(seen) > 5


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_even_sharding(layout, world):
    for total in range(0, 3000, 7):
        error = error_of(even_sharding, "shard", total, world, layout, 64)
        if error is None:
            one = even_sharding("shard", total, world, layout, 64)
            assert sum(one.lengths) == total and (world == 1 or one.chunk % 64 == 0)
            assert max(one.lengths) - min(one.lengths) <= one.chunk
        else:
            legal = int(error[1].rsplit(" ", 1)[1])
            assert total < legal
            even_sharding("shard", legal, world, layout, 64)
            assert error_of(even_sharding, "shard", legal - 1, world, layout, 64)


def test_page_sizes():
    assert sorted(PAGE_SIZES) == sorted(PAGES)

    def page(*totals_and_chunks):
        shardings = [Sharding("zigzag", 2, *one) for one in totals_and_chunks]
        return Tokens(tuple(shardings)).page_size("op")

    assert page((1000, 256)) == 256
    assert page((1000, 320)) == 64
    assert page((512, 128), (1000, 256)) == 128
    assert page((400, 112), (1000, 256)) == 16
    assert page((0, 0), (1000, 256)) == 256
    with pytest.raises(ValueError) as error:
        page((500, 128), (1000, 256))
    assert str(error.value) == (
        "op: cached must have chunks and lengths of a multiple of 16 tokens, got lengths [500] in "
        "chunks of [128]"
    )


# ---- shards


def round_trip(group, world):
    rank = dist.get_rank(group)
    x = torch.arange(2 * 64 * 2 * world * 3).view(2, -1, 3)
    # What Megatron gives its ranks: the sequence in 2W parts, of which each takes two.
    parts = x.chunk(2 * world, 1)
    theirs = torch.cat([parts[rank], parts[-1 - rank]], 1)
    assert torch.equal(shard(x, group=group), theirs if world > 1 else x)
    assert torch.equal(unshard(theirs, group=group), x)
    for tokens in (64 * (2 * world - 1) + 5, 1024):
        for layout in ("zigzag", "contiguous"):
            for shape, dim in (((2, tokens, 3), 1), ((tokens,), 0), ((2, 3, tokens), -1)):
                x = torch.randn(shape)
                mine = shard(x, dim, group=group, layout=layout)
                assert mine.is_contiguous() and mine.shape[dim] < tokens + (world == 1)
                assert torch.equal(unshard(mine, dim, group=group, layout=layout), x)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards(ranks, world):
    ranks.run(world, round_trip, world)


def bad_shards(group):
    return [
        error_of(shard, torch.zeros(1, 100), group=group),
        error_of(shard, torch.zeros(1, 512), group=group, layout="striped"),
        error_of(unshard, torch.zeros(1, 9), group=group, layout="striped"),
        error_of(unshard, torch.zeros(1, 50 + dist.get_rank(group)), group=group),
    ]


def test_bad_shards(ranks):
    errors = ranks.run(2, bad_shards)
    assert errors[0] == errors[1]
    assert errors[0] == [
        (
            ValueError,
            "shard: x must have tokens for 3 chunks of a multiple of block_size=64 and the "
            "beginning of another, got 100; the next legal length is 192",
        ),
        (ValueError, "shard: layout must be 'zigzag' or 'contiguous', got 'striped'"),
        (ValueError, "unshard: layout must be 'zigzag' or 'contiguous', got 'striped'"),
        (
            ValueError,
            "unshard: x must lie on the ranks in chunks of one length, of which only the last may "
            "be shorter, as layout='zigzag' deals them out, got 1 x 50, 1 x 51 tokens",
        ),
    ]


# ---- shares


def estimated(call, case):
    """The shares that a rank goes by: of the one sequence that each chunk of queries is."""
    groups = prepare_case(case, call, None).groups()
    return torch.cat([arguments["shares"].clone() for _, arguments in groups], 1)


def check_shares(group, case):
    shares._KEYS_AT_A_TIME = 100  # so that there are some pieces
    names = ("block_size", "causal", "scale", "num_sink_blocks", "num_local_blocks")
    settings = {name: case.arguments[name] for name in names if name in case.arguments}
    q, k, _ = case.whole()
    want = proxyattn.estimate_shares(q, k, **settings)
    got = estimated(case.call(group), case)
    pieces = len(got) // case.batch
    # One rounding unit of a value as large as 1 and the sums of some logits.
    torch.testing.assert_close(got, want.repeat_interleave(pieces, 0), rtol=0, atol=2e-6)
    everyone = [torch.empty_like(got) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, got, group=group)
    for other in everyone:
        assert_same_bits(other, got)
    return want.min().item(), want.max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("sinks", "local"), [(1, 1), (0, 0), (2, 3), (50, 1), (50, 0), (3, 50)])
def test_shares(ranks, dtype, causal, sinks, local):
    """Last chunks of few queries, of none, and behind earlier calls that end inside a block."""
    settings = {"causal": causal, "num_sink_blocks": sinks, "num_local_blocks": local}
    for layout, world, tokens, cached in (
        ("zigzag", 2, 64 * 7 + 5, ()),
        ("zigzag", 2, 64 * 6, (128 * 8 - 48,)),
        ("contiguous", 3, 64 * 5 + 60, (128 * 6 - 16,)),
        ("contiguous", 4, 64 * 4, ()),
    ):
        case = Sharded(tokens, (6, 2, 2), layout, 2, cached, dtype=dtype, settings=settings)
        ranges = ranks.run(world, check_shares, case)
        if (sinks, local) == (1, 1):
            low, high = ranges[0]
            assert 0.01 < low < high < 0.99


def test_scale_of_the_shares(ranks):
    case = Sharded(500, (4, 2, 2), settings={"scale": 0.3, "block_size": 128})
    ranks.run(2, check_shares, case)


def under_autocast(group):
    case = Sharded(500, (4, 2, 2))
    call = case.call(group)
    want = estimated(call, case)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(estimated(call, case), want)


def test_shares_under_autocast(ranks):
    ranks.run(2, under_autocast)


def one_nan(group):
    """A key of NaN on one rank: all ranks have a NaN share for the heads that read it."""
    case = Sharded(500, (4, 2, 2))
    call = case.call(group)
    if dist.get_rank(group) == 1:
        call["k"][0, 3, 1] = torch.nan
    return estimated(call, case)[0].isnan().tolist()


def test_nan_shares(ranks):
    assert ranks.run(2, one_nan) == [[False, False, True, True]] * 2


# ---- groups of heads


def test_heads_of_a_group():
    def heads(*arguments):
        return gather.group_heads("op", *arguments)

    worthwhile = gather.WORTHWHILE_BYTES
    assert heads(8, 1, worthwhile, None) == 1
    assert heads(8, 1, worthwhile // 2 + 1, None) == 2
    assert heads(8, 2, worthwhile // 3, None) == 4
    assert heads(8, 1, 1, None) == 8
    assert heads(8, 1, 1000, 8000) == 8
    assert heads(8, 1, 1000, 7999) == 3
    assert heads(8, 2, 1000, 4000) == 2
    assert heads(8, 8, 1000, 8000) == 8
    for arguments, needed in (((8, 1, 1000, 1999), 2000), ((8, 8, 1000, 7999), 8000)):
        with pytest.raises(ValueError) as error:
            heads(*arguments)
        assert str(error.value) == (
            f"op: max_gather_bytes must be at least {needed}, got {arguments[3]}"
        )


def memory_and_groups(group, case):
    """Groups of any size give the same bits, and take as many bytes as is said."""
    call = case.call(group)
    settings = {**case.arguments, "shares": torch.full((case.batch, case.heads[0]), 0.2)}
    want = context_parallel_attention(**call, **settings)
    error = error_of(context_parallel_attention, **call, **settings, max_gather_bytes=0)
    assert error[0] is ValueError
    least = int(error[1].split("at least ")[1].split(",")[0])
    _, kv_heads, proxies = case.heads
    page, world = 64, dist.get_world_size(group)
    tokens = -(-max(sum(parts) for parts in lengths_of(case, world)) // page) * page
    unit = max(1, kv_heads // proxies)
    head = 2 * world * case.batch * tokens * case.head_dim * case.dtype.itemsize
    assert least == min(2 * unit, kv_heads) * head
    rooms, made = [], gather.Gather.__init__

    def counting(self, *arguments):
        made(self, *arguments)
        rooms.append(sum(room.nbytes for room in self._room))

    gather.Gather.__init__ = counting
    try:
        for limit in (least, least + head, 2 * least, kv_heads * head, 10**12):
            out = context_parallel_attention(**call, **settings, max_gather_bytes=limit)
            assert_same_bits(out, want, str(limit))
            assert rooms[-1] <= limit
    finally:
        gather.Gather.__init__ = made
    assert rooms[0] == least and rooms[-1] == kv_heads * head


def what_happens(group):
    """In which order, and that attention reads the memory that the gather fills."""
    events, rooms = [], []
    original = {name: getattr(gather.Gather, name) for name in ("__init__", "start", "wait")}
    attend = attention.proxy_attention_varlen

    def note(name):
        def noted(self, *arguments):
            if name == "__init__":
                original[name](self, *arguments)
                return rooms.extend(room.untyped_storage().data_ptr() for room in self._room)
            if arguments[0] < len(self.groups):
                events.append(f"{name} {arguments[0]}")
            return original[name](self, *arguments)

        return noted

    def noted_attend(**arguments):
        i = len([event for event in events if event.startswith("attend")])
        events.append(f"attend {i}")
        for name in "kv":
            assert arguments[name].untyped_storage().data_ptr() == rooms[i % 2]
        return attend(**arguments)

    try:
        for name in original:
            setattr(gather.Gather, name, note(name))
        attention.proxy_attention_varlen = noted_attend
        case = Sharded(500, (3, 3, 3))
        limit = 2 * 2 * 2 * 256 * 64 * 4  # two groups of one head, K and V, from two ranks
        context_parallel_attention(**case.call(group), **case.arguments, max_gather_bytes=limit)
    finally:
        for name, function in original.items():
            setattr(gather.Gather, name, function)
        attention.proxy_attention_varlen = attend
    return events


def test_a_group_is_gathered_while_another_is_attended_to(ranks):
    assert (
        ranks.run(2, what_happens)
        == [
            [
                *("start 0", "start 1", "wait 0", "attend 0"),
                *("start 2", "wait 1", "attend 1", "wait 2", "attend 2"),
            ]
        ]
        * 2
    )


def small_workspace(group):
    case = Sharded(1000, (4, 2, 2))
    call, settings = case.call(group), case.arguments
    want = context_parallel_attention(**call, **settings)
    kind, message = error_of(context_parallel_attention, **call, **settings, max_workspace_bytes=5)
    assert kind is ValueError and "max_workspace_bytes must be at least" in message
    least = int(message.split("at least ")[1].split(",")[0])
    everyone = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, least, group=group)
    out = context_parallel_attention(**call, **settings, max_workspace_bytes=max(everyone))
    assert_same_bits(out, want)


def test_a_small_workspace_gives_the_same_bits(ranks):
    ranks.run(2, small_workspace)


def lengths_of(case, world):
    shardings = [
        even_sharding("shard", total, world, case.layout, 64)
        for total in (*case.cached, case.tokens)
    ]
    return list(zip(*(one.lengths for one in shardings), strict=True))


@pytest.mark.parametrize("heads", [(4, 4, 4), (8, 4, 2), (8, 4, 8), (6, 3, 1)], ids=str)
def test_memory(ranks, heads):
    case = Sharded(192 * 4 - 10, heads, batch=2, cached=(320 * 4 - 48,))
    if heads == (4, 4, 4):
        case = Sharded(192 * 4 - 10, heads, batch=2, cached=(320 * 4,))
        ranks.run(2, memory_and_groups, case)
