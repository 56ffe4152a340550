"""The chain over packed sequences on a GPU: replays of a captured graph in parts, with shares and
into a tensor of the caller, many sequences of all lengths, streams, and that nothing else is
written."""

import proxyattn
import pytest
import torch
from arguments import smallest_workspace
from packs import OPS, WITH_OUT, arguments_of, random_pack
from test_cuda import capture
from test_varlen_cuda import overwrite, pages, settings_of, used_part
from tolerance import assert_same_bits

#: Ops that work lists out, and may do so in parts.
CHAINS = ("choose_blocks_varlen", "proxy_attention_varlen")


CAPACITY = [(400, 700), (300, 300), (200, 600), (500, 500)]
REPLAYS = (
    [(400, 700), (0, 0), (1, 600), (64, 64)],
    [(0, 5), (300, 200), (0, 0), (17, 500)],
    [(400, 400), (300, 301), (200, 300), (500, 500)],
    CAPACITY,
)


def check_replays(cuda, op, page, **settings):
    """Captured at its capacities; lengths, tables and tokens change between replays."""
    captured = random_pack(cuda, CAPACITY, page=page, slack=1, spare=0)
    arguments = {**arguments_of(op, captured), **settings_of(op), **settings}

    def call():
        return list(getattr(proxyattn, op)(**arguments))

    graph, outputs = capture(call)
    for seed, lengths in enumerate(REPLAYS):
        pack = random_pack(cuda, lengths, page=page, slack=1, spare=0, seed=seed)
        overwrite(arguments, pack)
        if "shares" in arguments:
            arguments["shares"].uniform_()
        want = [x.clone() for x in call()]
        for output in outputs:
            output.zero_()
        graph.replay()
        for first, second in zip(outputs, want, strict=True):
            first, second = (used_part(op, pack, x).contiguous() for x in (first, second))
            assert_same_bits(first, second)


@pages
@pytest.mark.parametrize("mode", ["top_p", "last_block"])
@pytest.mark.parametrize("op", CHAINS)
def test_replays_in_parts(cuda, op, mode, page):
    """With so small a workspace that query blocks are taken one by one, or a few at a time."""
    pack = random_pack(cuda, CAPACITY, page=page, slack=1, spare=0)
    settings = {"budget_mode": mode}
    arguments = {**arguments_of(op, pack), **settings_of(op), **settings}
    needed = smallest_workspace(arguments, op=op)
    for limit in (needed, needed + needed // 2):
        check_replays(cuda, op, page, max_workspace_bytes=limit, **settings)


@pytest.mark.parametrize("op", CHAINS)
def test_replays_with_other_shares(cuda, op):
    check_replays(cuda, op, 64, shares=torch.rand(len(CAPACITY), 4, device=cuda))


@pages
@pytest.mark.parametrize("window", [1, 100, 300])
@pytest.mark.parametrize("op", CHAINS)
def test_replays_inside_a_window(cuda, op, window, page):
    check_replays(cuda, op, page, window=window)


@pages
def test_replays_into_a_tensor_of_the_caller(cuda, page):
    pack = random_pack(cuda, CAPACITY, page=page, slack=1, spare=0)
    check_replays(cuda, "proxy_attention_varlen", page, out=torch.zeros_like(pack.tensors["q"]))


# ---- many sequences, of all lengths


def many_lengths(count, longest):
    """From 1 to `longest` keys, log-uniform; some begin behind a cached prefix, some are empty."""
    lengths = []
    for i in range(count):
        kv_len = round(longest ** ((i * 7 % count + 1) / count))
        q_len = (kv_len, kv_len, min(kv_len, 100), 0)[i % 4]
        lengths.append((q_len, kv_len))
    return lengths


def only(pack, i):
    """The call with the other sequences' queries left out, at the same capacities."""
    places = {**pack.places, "cu_seqlens_q": pack.places["cu_seqlens_q"][i : i + 2]}
    for name in ("cu_seqlens_k", "seqused_k", "block_table"):
        if places.get(name) is not None:
            places[name] = places[name][i : i + 2 if name == "cu_seqlens_k" else i + 1]
    return {**pack.tensors, **places}


def check_many(pack, settings, limit, some):
    """Of the sequences at places `some`: the bits of a call without the others."""
    chain = {**settings, "return_lse": True, "max_workspace_bytes": limit}
    out, lse = proxyattn.proxy_attention_varlen(**pack.arguments, **chain)
    lists = proxyattn.choose_blocks_varlen(
        **pack.estimate_arguments, **settings, max_workspace_bytes=limit
    )
    for i in some:
        alone = only(pack, i)
        tokens, rows = pack.tokens(i), pack.rows(i, settings["block_size"])
        own_out, own_lse = proxyattn.proxy_attention_varlen(**alone, **settings, return_lse=True)
        assert_same_bits(out[tokens].contiguous(), own_out[tokens].contiguous(), f"{i}")
        assert_same_bits(lse[:, tokens].contiguous(), own_lse[:, tokens].contiguous(), f"{i}")
        alone.pop("v")
        own_lists = proxyattn.choose_blocks_varlen(**alone, **settings)
        for whole, own in zip(lists, own_lists, strict=True):
            assert torch.equal(whole[:, rows], own[:, : rows.stop - rows.start]), f"{i}"


@pages
@pytest.mark.parametrize("mode", ["top_p", "last_block"])
@pytest.mark.parametrize("block_size", [64, 128])
def test_nobody_feels_the_others(cuda, mode, block_size, page):
    pack = random_pack(cuda, many_lengths(24, 6000), (8, 2), 128, page=page, slack=2)
    settings = {"gamma": 0.7, "min_budget": 0, "budget_mode": mode, "block_size": block_size}
    check_many(pack, settings, None, range(24))
    needed = smallest_workspace(
        {**pack.arguments, **settings, "return_lse": True}, op="proxy_attention_varlen"
    )
    check_many(pack, settings, 2 * needed, range(0, 24, 5))


@pages
@pytest.mark.parametrize("mode", ["top_p", "last_block"])
@pytest.mark.parametrize("window", [64, 1000])
def test_nobody_feels_the_others_inside_a_window(cuda, window, mode, page):
    pack = random_pack(cuda, many_lengths(24, 6000), (8, 2), 128, page=page, slack=2)
    settings = {"gamma": 0.7, "min_budget": 0, "budget_mode": mode, "block_size": 64}
    check_many(pack, {**settings, "window": window}, None, range(24))


def test_more_sequences_than_a_thread_block_has_threads(cuda):
    lengths = [(1 + i % 3, 1 + i % 90) for i in range(1300)]
    lengths[700] = (3000, 9000)
    pack = random_pack(cuda, lengths, page=16, slack=1)
    settings = {"gamma": 0.7, "min_budget": 0, "budget_mode": "top_p", "block_size": 64}
    check_many(pack, settings, None, (0, 1, 511, 512, 699, 700, 701, 1023, 1024, 1299))


@pages
def test_capacities_far_above_what_is_used(cuda, page):
    """Lists and outputs are those of capacities that just do."""
    lengths = [(130, 130), (0, 70), (70, 300), (200, 90)]
    settings = {"gamma": 0.6, "min_budget": 0}
    tight = random_pack(cuda, lengths, page=page, spare=0, slack=1)
    roomy = random_pack(cuda, lengths, page=page, spare=4000, slack=300)
    used, rows = roomy.rest().start, sum(-(-q_len // 64) for q_len, _ in lengths)
    for op, part in ((CHAINS[0], (slice(None), slice(rows))), (CHAINS[1], (slice(used),))):
        small, large = (
            getattr(proxyattn, op)(**arguments_of(op, pack), **settings) for pack in (tight, roomy)
        )
        pairs = zip(small, large, strict=True) if isinstance(small, tuple) else [(small, large)]
        for first, second in pairs:
            first, second = first[part], second[part]
            if first.dim() == 3 and first.dtype == torch.int32:
                assert (second[..., first.shape[2] :] == -1).all()
                second = second[..., : first.shape[2]]
            assert_same_bits(first.contiguous(), second.contiguous(), op)


# ---- streams, races, and what is written


@pages
@pytest.mark.parametrize("op", OPS)
def test_thirty_runs_give_the_same_bits(cuda, op, page):
    """A race would show sooner or later."""
    pack = random_pack(cuda, many_lengths(20, 3000), page=page, slack=1)
    arguments = {**arguments_of(op, pack), **settings_of(op)}

    def call():
        outputs = getattr(proxyattn, op)(**arguments)
        return [used_part(op, pack, x).clone() for x in outputs]

    want = call()
    for _ in range(30):
        for first, second in zip(call(), want, strict=True):
            assert_same_bits(first.contiguous(), second.contiguous())


@pytest.mark.parametrize("op", OPS)
def test_runs_on_the_current_stream(cuda, op):
    """Lengths and tokens are written late on a side stream: the op waits there."""
    pack = random_pack(cuda, CAPACITY, page=64, slack=1, spare=0)
    arguments = {**arguments_of(op, pack), **settings_of(op)}
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    want = [x.clone() for x in getattr(proxyattn, op)(**arguments)]
    late = {name: torch.zeros_like(x) for name, x in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for name, x in tensors.items():
            late[name].copy_(x)
        got = getattr(proxyattn, op)(**{**arguments, **late})
    stream.synchronize()
    for first, second in zip(got, want, strict=True):
        assert_same_bits(*(used_part(op, pack, x).contiguous() for x in (first, second)))


@pages
@pytest.mark.parametrize("op", WITH_OUT)
def test_writes_nothing_but_its_rows(cuda, op, page):
    """Heads of a wider tensor, tokens of a longer one."""
    pack = random_pack(cuda, [(130, 130), (0, 70), (70, 300), (65, 20)], page=page, spare=40)
    arguments = {**arguments_of(op, pack), **settings_of(op)}
    whole = torch.full(
        (len(pack.tensors["q"]) + 600, 6, 64), 7.0, device=cuda, dtype=torch.bfloat16
    )
    out = whole[300:-300, 1:5]
    want = getattr(proxyattn, op)(**arguments)[0]
    getattr(proxyattn, op)(**arguments, out=out)
    used = pack.rest().start
    assert_same_bits(out[:used].contiguous(), want[:used].contiguous())
    out[:used] = 7
    assert (whole == 7).all()
