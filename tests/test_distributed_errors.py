"""Ranks that don't agree, and ranks that are gone: all fail alike, and before anything runs."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from proxyattn.distributed import agreement, context_parallel_attention
from proxyattn.distributed.gather import Gather
from ranks import error_of

OP = "context_parallel_attention"


def good_arguments(group):
    world, tokens = dist.get_world_size(group), 256
    q = torch.randn(2, tokens, 4, 64)
    k = torch.randn(2, tokens + 32, 2, 64)
    return {"q": q, "k": k, "v": k.clone(), "group": group, "shares": torch.zeros(2, 4)} | (
        {} if world > 1 else {"layout": "contiguous"}
    )


def outcome(group, changes):
    """What the call raises on this rank with the changes made there: arguments, or functions of the
    good ones."""
    arguments = good_arguments(group)
    for name, change in changes.get(dist.get_rank(group), changes.get("all", {})).items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    started, start = [], Gather.start
    Gather.start = lambda self, i: started.append(i) or start(self, i)
    try:
        with torch.no_grad():
            error = error_of(context_parallel_attention, **arguments)
    finally:
        Gather.start = start
    assert bool(started) == (error is None), "an error comes before everything else"
    return error


class tokens:
    """A function of a tensor, as are those below, that can be sent to other processes."""

    def __init__(self, count):
        self.count = count

    def __call__(self, x):
        return x[:, : self.count]


class heads(tokens):
    def __call__(self, x):
        return x[:, :, :1].expand(-1, -1, self.count, -1)


class cast(tokens):
    def __call__(self, x):
        return x.to(self.count)


def first(x):
    return x[0]


def first_sequence(x):
    return x[:1]


def every_other(x):
    return x[..., ::2]


def nothing(_):
    return None


def on_rank(rank, **changes):
    return {rank: changes}


def case_name(value):
    """The same in every process: changes are named by their arguments."""
    if isinstance(value, dict):
        return "-".join(map(str, value))
    return getattr(value, "__name__", str(value)[:60])


HALVES = {name: cast(torch.bfloat16) for name in "qkv"}
ONE_SEQUENCE = {name: first_sequence for name in ("q", "k", "v", "shares")}
DIFFERENT = [
    (on_rank(1, **HALVES), "dtype", "float32 on ranks 0, 2 and bfloat16 on rank 1"),
    (on_rank(0, **ONE_SEQUENCE), "batch", "1 on rank 0 and 2 on ranks 1, 2"),
    (on_rank(2, q=heads(8), shares=None), "q_heads", "4 on ranks 0, 1 and 8 on rank 2"),
    (on_rank(2, k=heads(4), v=heads(4)), "kv_heads", "2 on ranks 0, 1 and 4 on rank 2"),
    (on_rank(1, causal=False), "causal", "True on ranks 0, 2 and False on rank 1"),
    (on_rank(1, layout="contiguous"), "layout", "zigzag on ranks 0, 2 and contiguous on rank 1"),
    (on_rank(1, scale=0.25), "scale", "0.125 on ranks 0, 2 and 0.25 on rank 1"),
    (on_rank(0, gamma=0.5), "gamma", "0.5 on rank 0 and 0.9 on ranks 1, 2"),
    (on_rank(0, stride=8), "stride", "8 on rank 0 and 4 on ranks 1, 2"),
    (on_rank(0, pooling="first"), "pooling", "first on rank 0 and mean on ranks 1, 2"),
    (on_rank(0, block_size=128), "block_size", "128 on rank 0 and 64 on ranks 1, 2"),
    (on_rank(0, num_proxy_heads=2), "num_proxy_heads", "2 on rank 0 and 4 on ranks 1, 2"),
    (on_rank(0, min_budget=0), "min_budget", "0 on rank 0 and 512 on ranks 1, 2"),
    (on_rank(0, num_sink_blocks=0), "num_sink_blocks", "0 on rank 0 and 1 on ranks 1, 2"),
    (on_rank(0, num_local_blocks=3), "num_local_blocks", "3 on rank 0 and 1 on ranks 1, 2"),
    (on_rank(2, shares=None), "shares", "given on ranks 0, 1 and None on rank 2"),
    (on_rank(2, cached=[16, 16]), "length of cached", "1 on ranks 0, 1 and 2 on rank 2"),
    (
        {0: {"max_gather_bytes": 1 << 30}, 1: {"max_gather_bytes": 1 << 31}},
        "max_gather_bytes",
        "1073741824 on rank 0 and 2147483648 on rank 1 and None on rank 2",
    ),
    (
        on_rank(2, max_workspace_bytes=1 << 30),
        "max_workspace_bytes",
        "None on ranks 0, 1 and 1073741824 on rank 2",
    ),
]


@pytest.mark.parametrize(("changes", "name", "values"), DIFFERENT, ids=case_name)
def test_ranks_that_differ(ranks, changes, name, values):
    message = f"{OP}: {name} must be the same on every rank, got {values}"
    assert ranks.run(3, outcome, changes) == [(ValueError, message)] * 3


FAULTS = [
    ({"q": first}, ValueError, f"{OP}: q must have 4 dimensions, got shape [256, 4, 64]"),
    ({"k": first}, ValueError, f"{OP}: k must have 4 dimensions, got shape [288, 2, 64]"),
    (
        {"v": tokens(200)},
        ValueError,
        f"{OP}: v must have shape [2, 288, 2, 64], got [2, 200, 2, 64]",
    ),
    (
        {"k": every_other},
        ValueError,
        f"{OP}: k must have shape [2, 288, 2, 64], got [2, 288, 2, 32]",
    ),
    (
        {"k": tokens(200), "v": tokens(200)},
        ValueError,
        f"{OP}: k must have a key for every query, got 200 for 256 queries",
    ),
    (
        {"cached": [16, 20]},
        ValueError,
        f"{OP}: cached must count the 32 keys that k has more than q, got [16, 20]",
    ),
    (
        {"shares": first_sequence},
        ValueError,
        f"{OP}: shares must have shape [2, 4], got [1, 4]",
    ),
    (
        {"layout": "striped"},
        ValueError,
        f"{OP}: layout must be 'zigzag' or 'contiguous', got 'striped'",
    ),
    (
        {"budget_mode": "last_block"},
        ValueError,
        f"{OP}: budget_mode must be 'top_p', got 'last_block', whose budgets belong to the last "
        "queries of one call",
    ),
    ({"stride": 3}, ValueError, "proxy_attention: stride must be one of 1, 2, 4, 8, got stride=3"),
    (
        {"num_proxy_heads": 3},
        ValueError,
        "proxy_attention_varlen: num_proxy_heads must divide kv_heads or be a multiple of it "
        "that divides q_heads, got num_proxy_heads=3, kv_heads=2, q_heads=4",
    ),
    (
        {"window": 5},
        ValueError,
        "Settings: names must be among gamma, stride, pooling, block_size, num_proxy_heads, "
        "budget_mode, min_budget, num_sink_blocks, num_local_blocks, got 'window'",
    ),
    (
        {"v": cast(torch.float16)},
        TypeError,
        "proxy_attention_varlen: v must have the dtype of q, float32, got float16",
    ),
    (
        {name: cast(torch.float64) for name in "qkv"},
        TypeError,
        "proxy_attention_varlen: q must be float32, float16 or bfloat16, got float64",
    ),
    (
        {name: cast("meta") for name in "qkv"},
        TypeError,
        f"{OP}: q must be on a device whose tensors the group exchanges, cpu or cuda, got meta",
    ),
    (
        {"max_gather_bytes": {1}},
        TypeError,
        "Object of type set is not JSON serializable",
    ),
    (
        {"q": nothing},
        RuntimeError,
        "AttributeError: 'NoneType' object has no attribute 'dim'",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), FAULTS, ids=case_name)
def test_faults(ranks, changes, kind, message):
    """Of one rank, and of all, which say what one process would."""
    assert ranks.run(3, outcome, {1: changes}) == [(kind, f"{OP}: rank 1: {message}")] * 3
    assert ranks.run(2, outcome, {"all": changes}) == [(kind, message)] * 2


PLACES = [
    (
        on_rank(1, q=tokens(255)),
        f"{OP}: cached must lie on the ranks in chunks of one length, of which only the last may "
        "be shorter, as layout='zigzag' deals them out, got 1 x 32, 1 x 33 tokens",
    ),
    (
        on_rank(1, q=tokens(250), k=tokens(282), v=tokens(282)),
        f"{OP}: q must lie on the ranks in chunks of one length, of which only the last may be "
        "shorter, as layout='zigzag' deals them out, got 1 x 256, 1 x 250 tokens",
    ),
    (
        {"all": {"q": tokens(200), "k": tokens(232), "v": tokens(232)}},
        f"{OP}: q must have chunks of a multiple of block_size=64 tokens, got chunks of 100; the "
        "next legal length is 128, 512 tokens in all",
    ),
    (
        {"all": {"q": tokens(64), "k": tokens(64 + 20), "v": tokens(64 + 20)}},
        f"{OP}: q must have chunks of a multiple of block_size=64 tokens, got chunks of 32; the "
        "next legal length is 64, 256 tokens in all",
    ),
    (
        {"all": {"k": tokens(256 + 20), "v": tokens(256 + 20)}},
        f"{OP}: cached must have chunks and lengths of a multiple of 16 tokens, got lengths [40] "
        "in chunks of [10]",
    ),
    (
        {"all": {"max_gather_bytes": 5}},
        f"{OP}: max_gather_bytes must be at least 1179648, got 5",
    ),
]


@pytest.mark.parametrize(("changes", "message"), PLACES, ids=case_name)
def test_tokens_in_the_wrong_places(ranks, changes, message):
    assert ranks.run(2, outcome, changes) == [(ValueError, message)] * 2


def test_nothing_is_wrong(ranks):
    """The arguments that all of these change are fine."""
    assert ranks.run(3, outcome, {}) == [None] * 3


def gradient(group):
    arguments = good_arguments(group)
    if dist.get_rank(group) == 1:
        arguments["k"].requires_grad_()
    failed = error_of(context_parallel_attention, **arguments)
    with torch.no_grad():
        assert error_of(context_parallel_attention, **arguments) is None
    return failed


def test_no_backward(ranks):
    errors = ranks.run(2, gradient)
    assert errors[0] == errors[1] and errors[0][0] is RuntimeError
    assert errors[0][1].startswith(f"{OP}: rank 1: proxy_attention_varlen: ")


def too_many_calls(group):
    arguments = good_arguments(group)
    arguments["cached"] = [32] + [0] * 5000
    return error_of(context_parallel_attention, **arguments)


def test_more_cached_than_can_be_said(ranks):
    (kind, message), other = ranks.run(2, too_many_calls)
    assert (kind, message) == other and kind is ValueError
    assert message.startswith(f"{OP}: cached must be few enough numbers to send, got 1")
    assert message.endswith(f" bytes of arguments where {agreement.DESCRIPTION_BYTES} fit")


def not_a_member(_group, members):
    others = dist.new_group(members)
    return error_of(context_parallel_attention, *[torch.zeros(1, 64, 1, 64)] * 3, group=others)


def test_ranks_outside_the_group(ranks):
    errors = ranks.run(4, not_a_member, [0, 1])
    message = f"{OP}: group must hold this process, got a group of others"
    assert errors[2:] == [(ValueError, message)] * 2


def leave_alone(_group):
    """Rank 1 is there for the group and never calls."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=5))
    if dist.get_rank() == 0:
        q = torch.randn(1, 128, 2, 64)
        return error_of(context_parallel_attention, q, q, q, group=group)
    return None


def test_a_rank_that_never_calls(ranks):
    """Ends in torch's own error when the group's time is over."""
    (kind, _), *others = ranks.run(4, leave_alone)
    assert issubclass(kind, RuntimeError) and others == [None] * 3
