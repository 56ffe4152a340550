"""What must hold for packed sequences, however they are packed: neighbours, chunks, capacities,
edges, and numbers that nobody could check before."""

import re

import numpy as np
import proxyattn
import pytest
import torch
from arguments import message_of
from packs import GARBAGE, pack, random_lists, random_pack
from tolerance import assert_same_bits

SETTINGS = {"gamma": 0.6, "min_budget": 0, "num_proxy_heads": 2}
LENGTHS = [(130, 130), (0, 70), (70, 300), (200, 90), (64, 64), (1, 500), (5, 0)]
PLACES = [(None, "halves"), (16, "halves"), (64, "pairs"), (256, "heads_first")]


def place_name(place):
    return "packed" if place[0] is None else f"pages{place[0]}-{place[1]}"


def all_places(test):
    return pytest.mark.parametrize("place", PLACES, ids=place_name)(test)


def some_pack(device, place, lengths=LENGTHS, **options):
    return random_pack(device, lengths, page=place[0], cache=place[1], **options)


def attend(pack, lists, **settings):
    """out and lse for given lists, of the tokens that are in sequences."""
    out, lse = proxyattn.block_sparse_attention_varlen(
        **pack.arguments, indices=lists[0], counts=lists[1], return_lse=True, **settings
    )
    used = slice(0, pack.rest().start)
    return out[used], lse[:, used]


def assert_same_outputs(first, second):
    for a, b, name in zip(first, second, ("out", "lse"), strict=True):
        assert_same_bits(a.contiguous(), b.contiguous(), name)


def narrowed(indices, capacity):
    """Lists with room for so many entries."""
    more = indices.new_full((*indices.shape[:2], max(0, capacity - indices.shape[2])), GARBAGE[0])
    return torch.cat([indices, more], dim=2)[:, :, :capacity]


@all_places
def test_order_of_pages_and_capacities_change_nothing(device, place):
    """For given lists; on the CPU neither for the whole chain, on whose lists the room for scratch
    has no bearing there."""
    tight = some_pack(device, place, spare=0, slack=1, seed=1)
    blocks = -(-500 // 64)
    lists = random_lists(np.random.default_rng(1), tight, 2, 4, 64)
    lists[0] = narrowed(lists[0], blocks)
    want = attend(tight, lists)
    rows = sum(-(-q_len // 64) for q_len, _ in LENGTHS)
    for seed, spare, slack in ((2, 0, 1), (3, 200, 2), (4, 70, 40)):
        roomy = pack(device, tight.sequences, *place, spare=spare, slack=slack, seed=seed)
        more = random_lists(np.random.default_rng(seed), roomy, 2, 4, 64)
        more[0] = narrowed(more[0], blocks + seed)
        more[0][:, :rows, :blocks] = lists[0][:, :rows]
        more[1][:, :rows] = lists[1][:, :rows]
        assert_same_outputs(attend(roomy, more), want)
        if device == "cpu":
            first, second = (
                proxyattn.proxy_attention_varlen(**x.arguments, **SETTINGS)[: tight.rest().start]
                for x in (tight, roomy)
            )
            assert_same_bits(first, second)


@all_places
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_neighbours_reach_nobody(device, place, value):
    """One sequence at a time is whole, all others are NaN or Inf."""
    clean = some_pack(device, place, seed=5)
    lists = random_lists(np.random.default_rng(5), clean, 2, 4, 64)
    want = attend(clean, lists)
    chosen = proxyattn.choose_blocks_varlen(**clean.estimate_arguments, **SETTINGS)
    for i, (q_len, _) in enumerate(LENGTHS):
        spoilt = [
            tuple(x if j == i else torch.full_like(x, value) for x in sequence)
            for j, sequence in enumerate(clean.sequences)
        ]
        spoilt = pack(device, spoilt, *place, seed=6)
        own = clean.tokens(i)
        got = attend(spoilt, lists)
        assert_same_outputs((got[0][own], got[1][:, own]), (want[0][own], want[1][:, own]))
        again = proxyattn.choose_blocks_varlen(**spoilt.estimate_arguments, **SETTINGS)
        rows = clean.rows(i, 64)
        for first, second in zip(again, chosen, strict=True):
            assert torch.equal(first[:, rows], second[:, rows])
        out = proxyattn.proxy_attention_varlen(**spoilt.arguments, **SETTINGS)
        assert out[own].isfinite().all() and len(out[own]) == q_len


def test_values_behind_the_last_key_are_not_weighed(device):
    """A recycled page: the rest of it is another's, and 0 * NaN would be NaN."""
    sequence = some_pack(device, PLACES[1], [(100, 150)], seed=7)
    for part in (sequence.tensors["k"], sequence.tensors["v"]):
        last = int(sequence.places["block_table"][0, 150 // 16])
        assert part[last, 150 % 16 :].isnan().all() and part[last, : 150 % 16].isfinite().all()
    out, lse = proxyattn.proxy_attention_varlen(
        **sequence.arguments, **{**SETTINGS, "gamma": 1.0}, return_lse=True
    )
    assert out[:100].isfinite().all() and lse[:, :100].isfinite().all()


@pytest.mark.parametrize("shares", ["given", "zeros"])
@pytest.mark.parametrize("sizes", [(64, 64, 64), (128, 192, 64), (320, 64, 128)])
def test_chunks_read_what_the_whole_prompts_read(device, sizes, shares):
    """Prompts served in steps, each a chunk of every prompt behind what the cache holds of it, with
    the shares carried along."""
    prompts = random_pack(device, [(n, n) for n in (320, 500, 64)], seed=8)
    carried = torch.cat(
        [proxyattn.estimate_shares(q, k, block_size=64) for q, k, _ in prompts.sequences]
    )
    carried = carried if shares == "given" else torch.zeros_like(carried)
    settings = {**SETTINGS, "shares": carried, "block_size": 64}
    indices, counts = proxyattn.choose_blocks_varlen(**prompts.estimate_arguments, **settings)
    out = proxyattn.proxy_attention_varlen(**prompts.arguments, **settings)
    done = [0] * len(prompts.lengths)
    while any(at < n for at, (n, _) in zip(done, prompts.lengths, strict=True)):
        ends = [
            min(at + size, n) for at, size, (n, _) in zip(done, sizes, prompts.lengths, strict=True)
        ]
        chunks = [
            (q[:, at:end], k[:, :end], v[:, :end])
            for at, end, (q, k, v) in zip(done, ends, prompts.sequences, strict=True)
        ]
        step = pack(device, chunks, page=32, seed=sum(done))
        lists = proxyattn.choose_blocks_varlen(**step.estimate_arguments, **settings)
        step_out = proxyattn.proxy_attention_varlen(**step.arguments, **settings)
        for i, (at, end) in enumerate(zip(done, ends, strict=True)):
            rows, whole = step.rows(i, 64), prompts.rows(i, 64).start + at // 64
            whole_rows = slice(whole, whole + rows.stop - rows.start)
            blocks = -(-end // 64)
            assert torch.equal(lists[1][:, rows], counts[:, whole_rows])
            assert torch.equal(lists[0][:, rows, :blocks], indices[:, whole_rows, :blocks])
            tokens = prompts.tokens(i).start
            if device == "cpu":
                assert_same_bits(step_out[step.tokens(i)], out[tokens + at : tokens + end])
        done = ends


def test_shares_are_those_of_each_sequence(device):
    sequences = some_pack(device, PLACES[2], seed=9)
    shares = torch.rand(len(LENGTHS), 4, device=device)
    settings = {**SETTINGS, "shares": shares}
    indices, counts = proxyattn.choose_blocks_varlen(**sequences.estimate_arguments, **settings)
    for i, (q_len, kv_len) in enumerate(LENGTHS):
        if q_len > kv_len:
            continue
        own = {**SETTINGS, "shares": shares[i : i + 1]}
        want, want_counts = proxyattn.choose_blocks(*sequences.sequences[i][:2], **own)
        rows = sequences.rows(i, 64)
        assert torch.equal(counts[:, rows], want_counts[0])
        assert torch.equal(indices[:, rows, : want.shape[3]], want[0])


@all_places
@pytest.mark.parametrize("first", [1, 63, 64, 65, 130])
def test_more_queries_than_keys(device, place, first):
    """The first see nothing; with shares given the blocks behind read what they would alone."""
    lengths = [(300, 300 - first), (40, 40)]
    both = some_pack(device, place, lengths, seed=10)
    shares = torch.full((2, 4), 0.1, device=device)
    settings = {**SETTINGS, "shares": shares, "block_size": 64, "stride": 1}
    out, lse = proxyattn.proxy_attention_varlen(**both.arguments, **settings, return_lse=True)
    indices, counts = proxyattn.choose_blocks_varlen(**both.estimate_arguments, **settings)
    assert (out[:first] == 0).all() and (lse[:, :first] == -torch.inf).all()
    assert out[first:300].isfinite().all() and lse[:, first:300].isfinite().all()
    blind = first // 64
    assert (counts[:, :blind] == 0).all() and (indices[:, :blind] == -1).all()
    assert (counts[:, blind:5] > 0).all()
    # The block in which the first query sees something is no block of a call without the others.
    behind = -(-first // 64)
    q, k, _ = both.sequences[0]
    alone = {**settings, "shares": shares[:1]}
    want, want_counts = proxyattn.choose_blocks(q[:, 64 * behind :], k, **alone)
    assert torch.equal(counts[:, behind:5], want_counts[0])
    assert torch.equal(indices[:, behind:5, : want.shape[3]], want[0])


@pytest.mark.parametrize("mode", ["top_p", "last_block"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "lengths", [[(0, 0)], [(0, 9), (0, 0), (0, 3)], [(3, 0), (0, 5), (70, 0)], []], ids=str
)
def test_empty(device, lengths, causal, mode):
    """No queries, no keys, no sequences."""
    settings = {**SETTINGS, "causal": causal, "budget_mode": mode}
    for place in PLACES[:2]:
        empty = some_pack(device, place, lengths or [(0, 0)], spare=0)
        if not lengths:
            for name, value in empty.places.items():
                if isinstance(value, torch.Tensor):
                    empty.places[name] = value[: len(value) - 1]
        out, lse = proxyattn.proxy_attention_varlen(**empty.arguments, **settings, return_lse=True)
        tokens = sum(q_len for q_len, _ in lengths)
        assert out.shape == (tokens, 4, 64) and (out == 0).all()
        assert lse.shape == (4, tokens) and (lse == -torch.inf).all()
        lists = proxyattn.choose_blocks_varlen(**empty.estimate_arguments, **settings)
        assert (lists[1] == 0).all()
        assert_same_outputs(attend(empty, lists, causal=causal), (out, lse))


@pytest.mark.parametrize("lengths", [[(1, 1)], [(70, 1)], [(0, 0), (1, 1), (0, 0)]], ids=str)
@all_places
def test_a_single_key(device, place, lengths):
    """Every query that sees it gets its value."""
    some = some_pack(device, place, lengths, spare=0)
    for causal in (True, False):
        out = proxyattn.proxy_attention_varlen(**some.arguments, **SETTINGS, causal=causal)
        (value,) = (v[0, 0] for _, _, v in some.sequences if v.shape[1])
        want = value.repeat_interleave(2, 0).expand_as(out).clone()
        if causal:
            want[:-1] = 0
        assert_same_bits(out, want)


def test_out_may_be_a_part_of_something(device):
    """Any strides with the last dimension contiguous; nothing beside it is written."""
    some = some_pack(device, PLACES[1], seed=11)
    want, want_lse = proxyattn.proxy_attention_varlen(**some.arguments, **SETTINGS, return_lse=True)
    used = some.rest().start
    whole = torch.full((len(want) + 2, 6, 72), 7, dtype=want.dtype, device=device)
    heads_first = torch.full((4, len(want), 64), 7, dtype=want.dtype, device=device)
    for out in (whole[1:-1, 1:5, :64], heads_first.transpose(0, 1)):
        got, lse = proxyattn.proxy_attention_varlen(
            **some.arguments, **SETTINGS, return_lse=True, out=out
        )
        assert got is out
        assert_same_bits(out[:used].contiguous(), want[:used])
        assert_same_bits(lse[:, :used].contiguous(), want_lse[:, :used].contiguous())
        assert (out[used:] == 7).all()
    whole[1:-1, 1:5, :64] = 7
    assert (whole == 7).all()


@pytest.mark.parametrize("job", ["proxy_attention_varlen", "choose_blocks_varlen"])
@all_places
def test_a_small_workspace_gives_the_same_bits(device, place, job):
    some = some_pack(device, place, [(700, 900), (100, 100), (0, 800), (900, 700)], seed=12)
    arguments = some.arguments if job == "proxy_attention_varlen" else some.estimate_arguments
    arguments = {**arguments, **SETTINGS}
    function = getattr(proxyattn, job)

    def call(limit):
        result = function(**arguments, max_workspace_bytes=limit)
        if job == "proxy_attention_varlen":
            return [result[: some.rest().start]]
        rows = sum(-(-q_len // 64) for q_len, _ in some.lengths)
        return [result[0][:, :rows].contiguous(), result[1]]

    with pytest.raises(ValueError) as error:
        call(0)
    needed = int(re.search(r"at least (\d+)", message_of(error))[1])
    for limit in (0, needed - 1):
        with pytest.raises(ValueError) as error:
            call(limit)
        assert message_of(error) == (
            f"{job}: max_workspace_bytes must be at least {needed}, got max_workspace_bytes={limit}"
        )
    want = call(None)
    for limit in (needed, needed + 5000, 2 * needed, 2**62):
        for first, second in zip(call(limit), want, strict=True):
            assert_same_bits(first, second)


# ---- numbers that only the device knows


def hostile(rng, tensor, places):
    """A copy in which so many numbers are something else."""
    changed = tensor.clone().view(-1)
    values = (*GARBAGE, 0, 1, 70, 131, 300, 9999)
    for at in rng.choice(len(changed), size=places, replace=False):
        changed[at] = int(rng.choice(values))
    return changed.view(tensor.shape)


@all_places
@pytest.mark.parametrize("seed", range(8))
def test_no_number_leads_outside(device, place, seed):
    """Whatever starts, lengths and tables say. A sanitizer would see reads; writes show here."""
    rng = np.random.default_rng(seed)
    some = some_pack(device, place, seed=13, slack=1)
    names = [n for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table")]
    names = [name for name in names if some.places.get(name) is not None]
    for name in [*names, *names]:
        some.places[name] = hostile(rng, some.places[name], int(rng.integers(1, 4)))
    tokens = len(some.tensors["q"])
    whole = torch.full((tokens + 400, 4, 64), 7, dtype=torch.bfloat16, device=device)
    out = whole[200:-200]
    result = proxyattn.proxy_attention_varlen(
        **some.arguments, **SETTINGS, out=out, return_lse=True
    )
    assert result[0] is out
    assert (whole[:200] == 7).all() and (whole[-200:] == 7).all()
    lists = proxyattn.choose_blocks_varlen(**some.estimate_arguments, **SETTINGS)
    blocks = lists[0].shape[2]
    assert ((lists[1] >= 0) & (lists[1] <= blocks)).all()
    proxyattn.block_sparse_attention_varlen(
        **some.arguments, indices=lists[0], counts=lists[1], out=out
    )
    assert (whole[:200] == 7).all() and (whole[-200:] == 7).all()


def test_what_is_wrong_with_one_sequence_stays_there(device):
    """Pages that there are none of, and more keys than the capacities: the others are as ever."""
    some = some_pack(device, PLACES[1], seed=14, slack=1)
    want = proxyattn.proxy_attention_varlen(**some.arguments, **SETTINGS)
    wrong = 2  # 70 queries, 300 keys
    for name, at, value in (
        ("block_table", (wrong, 3), 10**6),
        ("block_table", (wrong, 0), -1),
        ("seqused_k", wrong, 10**9),
        ("seqused_k", wrong, -5),
    ):
        places = {**some.places, name: some.places[name].clone()}
        places[name][at] = value
        got = proxyattn.proxy_attention_varlen(**some.tensors, **places, **SETTINGS)
        for i in range(len(LENGTHS)):
            if i != wrong:
                assert_same_bits(got[some.tokens(i)], want[some.tokens(i)], f"{name}, {i}")


def test_pages_that_there_are_none_of_read_as_zeros(device):
    some = some_pack(device, PLACES[2], [(200, 200)], seed=15)
    zeros = {**some.tensors, **{name: some.tensors[name].clone() for name in "kv"}}
    page = int(some.places["block_table"][0, 1])
    for name in "kv":
        zeros[name][page] = 0
    dense = {**SETTINGS, "gamma": 1.0}
    want = proxyattn.proxy_attention_varlen(**zeros, **some.places, **dense)
    for value in GARBAGE:
        some.places["block_table"][0, 1] = value
        got = proxyattn.proxy_attention_varlen(**some.arguments, **dense)
        assert_same_bits(got[:200], want[:200])


def bad_numbers():
    """(places of PLACES, name, index, its value, what is said of it), for the first LENGTHS."""
    return [
        (0, "cu_seqlens_q", 0, -3, "cu_seqlens_q must be in [0, 475], got cu_seqlens_q[0]=-3"),
        (1, "cu_seqlens_q", 7, 476, "cu_seqlens_q must be in [0, 475], got cu_seqlens_q[7]=476"),
        (
            0,
            "cu_seqlens_q",
            2,
            99,
            "cu_seqlens_q must not decrease, got cu_seqlens_q[2]=99 after 130",
        ),
        (
            0,
            "cu_seqlens_q",
            3,
            401,
            "cu_seqlens_q must not decrease, got cu_seqlens_q[4]=400 after 401",
        ),
        (
            0,
            "max_seqlen_q",
            None,
            199,
            "cu_seqlens_q must give a sequence at most max_seqlen_q=199 tokens, got 200 for "
            "sequence 3",
        ),
        (
            0,
            "max_seqlen_k",
            None,
            499,
            "cu_seqlens_k must give a sequence at most max_seqlen_k=499 tokens, got 500 for "
            "sequence 5",
        ),
        (
            0,
            "cu_seqlens_k",
            1,
            10**6,
            "cu_seqlens_k must be in [0, 1159], got cu_seqlens_k[1]=1000000",
        ),
        (1, "seqused_k", 4, -1, "seqused_k must be in [0, 500], got seqused_k[4]=-1"),
        (1, "seqused_k", 5, 501, "seqused_k must be in [0, 500], got seqused_k[5]=501"),
        (
            2,
            "block_table",
            (2, 4),
            -1,
            "block_table must name pages in [0, 24), got block_table[2, 4]=-1",
        ),
        (
            2,
            "block_table",
            (0, 1),
            24,
            "block_table must name pages in [0, 24), got block_table[0, 1]=24",
        ),
    ]


@pytest.mark.parametrize(("place", "name", "at", "value", "message"), bad_numbers())
def test_check(device, monkeypatch, place, name, at, value, message):
    some = some_pack(device, PLACES[place], seed=16, slack=1)
    if at is None:
        some.places[name] = value
    else:
        some.places[name][at] = value
    lists = random_lists(np.random.default_rng(16), some, 2, 4, 64)
    calls = {
        "proxy_attention_varlen": some.arguments,
        "choose_blocks_varlen": some.estimate_arguments,
        "block_sparse_attention_varlen": {
            **some.arguments,
            "indices": torch.zeros_like(lists[0]),
            "counts": torch.zeros_like(lists[1]),
        },
    }
    with pytest.raises(ValueError) as error:
        proxyattn.check_sequences(**some.estimate_arguments)
    assert message_of(error) == f"check_sequences: {message}"
    for op, arguments in calls.items():
        monkeypatch.setenv("PROXYATTN_CHECK", "0")
        getattr(proxyattn, op)(**arguments)
        monkeypatch.setenv("PROXYATTN_CHECK", "1")
        with pytest.raises(ValueError) as error:
            getattr(proxyattn, op)(**arguments)
        assert message_of(error) == f"{op}: {message}"


def test_check_takes_what_is_right(device, monkeypatch):
    monkeypatch.setenv("PROXYATTN_CHECK", "1")
    for place in PLACES:
        for slack, spare in ((1, 0), (5, 90)):
            some = some_pack(device, place, seed=17, slack=slack, spare=spare)
            proxyattn.proxy_attention_varlen(**some.arguments, **SETTINGS)
            proxyattn.choose_blocks_varlen(**some.estimate_arguments, **SETTINGS)
            attend(some, random_lists(np.random.default_rng(17), some, 4, 4, 64))
            assert proxyattn.check_sequences(**some.estimate_arguments) is None


def test_check_of_lists(device, monkeypatch):
    """Of the query blocks of sequences, each against the blocks of its own."""
    some = some_pack(device, PLACES[1], seed=18)
    row = some.rows(2, 64).start  # 300 keys: five blocks
    for (name, value), message in {
        ("indices", 5): "indices must name key blocks in [0, 5), got 5",
        ("indices", -1): "indices must name key blocks in [0, 5), got -1",
        ("counts", 10): "counts must be in [0, 9], the lists' capacity, got 10",
        ("counts", -1): "counts must be in [0, 9], the lists' capacity, got -1",
    }.items():
        indices, counts = random_lists(np.random.default_rng(18), some, 2, 4, 64)
        counts[:, row] = 3
        (indices[:, row] if name == "indices" else counts[:, row, None])[:, 0] = value
        monkeypatch.setenv("PROXYATTN_CHECK", "1")
        with pytest.raises(ValueError) as error:
            attend(some, (indices, counts))
        assert message_of(error) == f"block_sparse_attention_varlen: {message}"
    indices[1, row, :2], counts[:, row] = 4, 2
    with pytest.raises(ValueError) as error:
        attend(some, (indices, counts))
    assert message_of(error) == (
        "block_sparse_attention_varlen: indices must be unique in each list, got 4 twice"
    )
