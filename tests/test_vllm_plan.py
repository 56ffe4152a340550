"""Which rows of a step proxyattn.vllm runs sparse, and its settings: numbers, without vLLM."""

import random

import pytest
from proxyattn import Settings
from proxyattn.vllm import ServingSettings
from proxyattn.vllm._memory import keys_of_a_call, scratch_bytes
from proxyattn.vllm._plan import count_kinds, kinds_of, make_plan

LEAST = {"min_seqlen": 4096, "min_queries": 128}


def starts_of(queries):
    starts = [0]
    for number in queries:
        starts.append(starts[-1] + number)
    return starts


def plan_of(queries, keys, room=1 << 30):
    starts = starts_of(queries)
    kinds = kinds_of(starts, keys, **LEAST)
    return kinds, make_plan(kinds, starts, keys, room)


def test_decodes_alone_have_no_plan():
    kinds, plan = plan_of([1, 1, 1], [5000, 100000, 1])
    assert kinds == ["decode"] * 3 and plan is None


def test_one_whole_prompt():
    _, plan = plan_of([8000], [8000])
    (sparse,) = plan.sparse
    assert sparse.rows == (0, 1) and sparse.tokens == (0, 8000)
    assert (sparse.max_queries, sparse.max_keys) == (8000, 8000)
    assert plan.dense == () and sparse.hidden == ()


def test_long_rows_behind_decodes_and_short_ones_are_one_span():
    kinds, plan = plan_of([1, 1, 40, 900, 2000, 5000], [9000, 10, 9000, 900, 30000, 5000])
    assert kinds == ["decode", "decode", "few queries", "short", "sparse", "sparse"]
    (sparse,) = plan.sparse
    assert sparse.rows == (4, 6) and sparse.tokens == (942, 7942)
    assert (sparse.max_queries, sparse.max_keys) == (5000, 30000)
    (dense,) = plan.dense
    assert dense.rows == (0, 4) and dense.tokens == (0, 942)
    assert (dense.max_queries, dense.max_keys) == (900, 9000)


def test_short_rows_between_long_ones_are_hidden_and_run_dense():
    _, plan = plan_of([1, 200, 300, 301, 400, 500], [7, 9000, 300, 301, 8000, 500])
    (sparse,) = plan.sparse
    assert sparse.rows == (1, 5) and sparse.hidden == (2, 3) and sparse.max_keys == 9000
    assert [dense.rows for dense in plan.dense] == [(0, 1), (2, 4), (5, 6)]
    assert [dense.tokens for dense in plan.dense] == [(0, 1), (201, 802), (1202, 1702)]


def test_padding_is_in_no_dense_span():
    kinds, plan = plan_of([1, 0, 200, 0, 0], [5, 0, 5000, 0, 0])
    assert kinds == ["decode", None, "sparse", None, None]
    assert [sparse.rows for sparse in plan.sparse] == [(2, 3)]
    assert [dense.rows for dense in plan.dense] == [(0, 1)]
    assert count_kinds(kinds) == {"decode": 1, "sparse": 1}


@pytest.mark.parametrize(
    ("room", "spans"),
    [
        (3 * 9000, [(0, 3)]),
        (3 * 9000 - 1, [(0, 2), (2, 3)]),
        (2 * 6000 - 1, [(0, 1), (1, 2), (2, 3)]),
        (1, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_a_call_has_room_for_rows_times_their_most_keys(room, spans):
    _, plan = plan_of([500, 600, 700], [5000, 6000, 9000], room)
    assert [sparse.rows for sparse in plan.sparse] == spans


def test_short_rows_between_calls_are_in_none():
    _, plan = plan_of([500, 600, 700], [5000, 600, 9000], room=1)
    assert [sparse.rows for sparse in plan.sparse] == [(0, 1), (2, 3)]
    assert all(sparse.hidden == () for sparse in plan.sparse)


@pytest.mark.parametrize(
    ("queries", "keys", "kind"),
    [
        (127, 4096, "few queries"),
        (128, 4096, "sparse"),
        (128, 4095, "short"),
        (4095, 4095, "short"),
        (4096, 4096, "sparse"),
        (1, 1, "decode"),
    ],
)
def test_what_is_long(queries, keys, kind):
    assert kinds_of([0, queries], [keys], **LEAST) == [kind]


def test_decodes_are_never_sparse():
    assert kinds_of([0, 1], [9], min_seqlen=1, min_queries=1) == ["decode"]


@pytest.mark.parametrize("seed", range(20))
def test_every_query_is_in_one_part(seed):
    choose = random.Random(seed)
    queries = [choose.choice([0, 1, 1, 50, 200, 3000]) for _ in range(choose.randint(1, 12))]
    keys = [number + choose.choice([0, 0, 5000]) for number in queries]
    starts = starts_of(queries)
    kinds, plan = plan_of(queries, keys, room=choose.choice([1, 10000, 20000, 1 << 30]))
    if plan is None:
        assert "sparse" not in kinds
        return
    seen = [0] * starts[-1]
    for span in plan.sparse:
        for row in set(range(*span.rows)) - set(span.hidden):
            assert kinds[row] in ("sparse", None)
            assert queries[row] <= span.max_queries and keys[row] <= span.max_keys
            for token in range(starts[row], starts[row + 1]):
                seen[token] += 1
    for span in plan.dense:
        assert span.tokens == (starts[span.rows[0]], starts[span.rows[1]])
        for row in range(*span.rows):
            assert kinds[row] not in ("sparse", None)
            assert queries[row] <= span.max_queries and keys[row] <= span.max_keys
        for token in range(*span.tokens):
            seen[token] += 1
    assert set(seen) == {1}


# ---- settings


def test_settings_have_defaults():
    for given in ({}, {"proxyattn": None}, {"proxyattn": {}}, {"other": 1}, None):
        assert ServingSettings.from_config(given) == ServingSettings(Settings())


def test_settings_are_read():
    given = {"gamma": 0.8, "num_proxy_heads": 4, "min_seqlen": 9, "min_queries": 7}
    read = ServingSettings.from_config({"proxyattn": given})
    assert read == ServingSettings(Settings(gamma=0.8, num_proxy_heads=4), 9, 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gama": 0.9}, "proxyattn.vllm: settings must be among min_seqlen, .*, got 'gama'"),
        ({"min_seqlen": 0}, "proxyattn.vllm: min_seqlen must be an integer of at least 1, got 0"),
        ({"min_queries": "a"}, "min_queries must be an integer of at least 1, got 'a'"),
        ({"min_queries": True}, "min_queries must be an integer of at least 1, got True"),
        ({"gamma": "high"}, "Settings: gamma must be a number or None, got 'high'"),
        ({"block_size": 48}, "block_size must"),
        ([1], r"additional_config\['proxyattn'\] must hold names and values, got \[1\]"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        ServingSettings.from_config({"proxyattn": given})


def test_proxy_heads_fit_the_heads_of_a_rank():
    four = Settings(num_proxy_heads=4)
    assert four.fit(32, 8) is four
    assert four.fit(8, 2) is four  # a quarter of them, on each of four ranks
    assert four.fit(6, 3).num_proxy_heads == 3
    assert four.fit(7, 1).num_proxy_heads == 7  # of two as near, the larger
    assert Settings().fit(6, 3) == Settings()


def test_memory_of_a_call_as_the_readme_has_it():
    settings = Settings().resolve(32, 8)
    mib = 1 << 20
    # 131072 / 4 windows of 8 heads of 128 in two bytes and an eighth, the pieces, the kernels' own.
    assert scratch_bytes(settings, 32, 8, 128, 2, 131072) == (72 + 512 + 288) * mib
    assert scratch_bytes(settings, 64, 8, 128, 2, 1 << 20) == (576 + 512 + 288) * mib
    assert scratch_bytes(settings, 64, 8, 128, 2, 1 << 21) == (1152 + 512 + 576) * mib
    assert keys_of_a_call(4096) == 1 << 19 and keys_of_a_call(1 << 20) == 1 << 20
