"""The hook's mask function by itself, and what its signs stand for."""

import pytest
import torch
from hf_tiny import EXACT, hf, transformers
from proxyattn import Settings
from proxyattn.hf._attend import attend_packed
from proxyattn.hf._causal import dense_mask, read_sign
from proxyattn.hf._ops import Rule
from proxyattn.hf._packed import packing_of
from tolerance import assert_same_bits
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

Q_LEN, KV_LEN = 150, 400


@pytest.fixture(autouse=True)
def _settings():
    hf.register(**EXACT)


def mask_of(function=None, **changes):
    arguments = {
        "batch_size": 2,
        "q_length": Q_LEN,
        "kv_length": KV_LEN,
        "q_offset": KV_LEN - Q_LEN,
        "mask_function": causal_mask_function,
        "device": "cpu",
    }
    function = function or transformers.AttentionMaskInterface()["proxyattn"]
    return function(**{**arguments, **changes})


def rows(*spans, length=KV_LEN):
    """A padding mask: each row's real tokens."""
    mask = torch.zeros(len(spans), length, dtype=torch.bool)
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = True
    return mask


ALL_REAL = {
    "no mask": {},
    "a whole prompt": {"q_length": 400, "q_offset": 0},
    "an all-ones mask": {"attention_mask": rows((0, 400), (0, 400))},
    "a window that holds all keys": {
        "mask_function": sliding_window_causal_mask_function(400),
        "local_size": 400,
    },
    "a chunk that holds all keys": {
        "mask_function": chunked_causal_mask_function(512, torch.zeros(2, dtype=torch.int)),
        "local_size": 512,
    },
}


@pytest.mark.parametrize("changes", ALL_REAL.values(), ids=ALL_REAL)
def test_causal_prompts_get_a_sign_without_memory(changes):
    sign = mask_of(**changes)
    assert sign.dtype == torch.int32 and sign.numel() == 0
    causal = read_sign(sign)
    assert (causal.q_len, causal.kv_len) == (changes.get("q_length", Q_LEN), KV_LEN)
    assert causal.seen == KV_LEN and causal.sequences is None


def test_a_static_cache_has_room_behind_the_tokens():
    for offset in (100, torch.tensor(100)):
        causal = read_sign(mask_of(q_offset=offset))
        assert (causal.seen, causal.kv_len, causal.sequences) == (250, 400, None)
    # A tokenizer's mask is as long as the tokens.
    causal = read_sign(mask_of(q_offset=100, attention_mask=rows((0, 250), (0, 250), length=250)))
    assert (causal.seen, causal.sequences) == (250, None)


def test_a_short_prompt_gets_a_sign_too():
    # Models that cut queries would take SDPA's None for a mask of the cut ones.
    causal = read_sign(mask_of(q_length=20, kv_length=20, q_offset=0))
    assert (causal.q_len, causal.seen) == (20, 20)


PADDED = {
    "left": {"attention_mask": rows((30, 400), (0, 400))},
    "right": {"attention_mask": rows((0, 380), (0, 400))},
    "left, in the queries": {"attention_mask": rows((300, 400), (0, 400))},
    "a gap": {"attention_mask": rows((0, 400), (0, 400)).index_fill(1, torch.tensor([200]), False)},
    "short": {"attention_mask": rows((0, 300), (0, 300), length=300)},
    "long": {"attention_mask": rows((10, 500), (0, 500), length=500)},
    "static": {"q_offset": 100, "attention_mask": rows((30, 250), (0, 250), length=250)},
}


@pytest.mark.parametrize("changes", PADDED.values(), ids=PADDED)
def test_padded_prompts_get_a_sign_that_stands_for_their_mask(changes):
    sign = mask_of(**changes)
    assert sign.shape == (2, KV_LEN, 2, 3) and sign.dtype == torch.int32
    assert sign.stride()[2] == 0  # no memory
    causal = read_sign(sign)
    assert causal.seen == changes.get("q_offset", KV_LEN - Q_LEN) + Q_LEN
    expected = mask_of(sdpa_mask, **changes)
    assert_same_bits(dense_mask(causal, Q_LEN, sign.device), expected)


@pytest.mark.parametrize("offset", [100, 250])
def test_a_sign_after_a_prefix_stands_for_its_mask(offset):
    sign, expected = mask_of(q_offset=offset), mask_of(sdpa_mask, q_offset=offset)
    assert_same_bits(dense_mask(read_sign(sign), Q_LEN, sign.device), expected[:1])
    # Cut to the last two queries, by a model that needs no others.
    cut = read_sign(sign[:, :, -2:])
    assert cut.q_len == 2
    assert_same_bits(dense_mask(cut, 2, sign.device), expected[:1, :, -2:])


def test_a_sign_of_a_whole_prompt_stands_for_no_mask():
    for q_len in (KV_LEN, 100):  # behind the latter a static cache has room
        sign = mask_of(q_length=q_len, q_offset=0)
        assert dense_mask(read_sign(sign), q_len, sign.device) is None
        assert mask_of(sdpa_mask, q_length=q_len, q_offset=0) is None


NOT_CAUSAL = {
    "another function": {"mask_function": lambda b, h, q, k: (k <= q) & (k > 2)},
    "additions": {"allow_is_causal_skip": False},
    "keys that were dropped": {"kv_offset": 3},
    "a window": {"mask_function": sliding_window_causal_mask_function(399), "local_size": 399},
    "more queries than room": {"q_offset": 300},
    "one query": {"q_length": 1, "q_offset": 399, "allow_is_causal_skip": False},
}


@pytest.mark.parametrize("changes", [{}, {"attention_mask": rows((30, 400), (0, 400))}])
def test_a_sign_cannot_be_taken_for_a_mask(changes):
    sign, scores = mask_of(**changes), torch.zeros(2, 4, Q_LEN, KV_LEN)
    for misuse in (
        lambda: scores + sign,
        lambda: scores.masked_fill(sign != 0, 0.0),
        lambda: torch.where(sign.bool(), scores, 0.0),
    ):
        with pytest.raises(RuntimeError, match="must match"):
            misuse()


@pytest.mark.parametrize("changes", NOT_CAUSAL.values(), ids=NOT_CAUSAL)
def test_other_masks_are_those_of_sdpa(changes):
    actual, expected = mask_of(**changes), mask_of(sdpa_mask, **changes)
    assert_same_bits(actual, expected)
    assert read_sign(actual) is None


def test_no_sign_is_no_mask():
    assert read_sign(None) is None
    assert mask_of(q_length=1, q_offset=399) is None


# ---- sequences of a batch


def _causal_attention(q, k, v):
    """Bottom-right aligned, in float64."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=ones)
    return out.transpose(1, 2)


def test_sequences_attend_to_themselves():
    numbers = torch.tensor(
        [
            [0, 0, 1, 1, 0, 1, 1, 1, -1],  # left padding, and a gap
            [1, 1, 1, 1, 1, 1, 0, 0, -1],  # right padding
            [0, 0, 1, 1, 0, 1, 1, 1, -1],  # as the first
            [1, 1, 1, 2, 2, 2, 2, 3, -1],  # packed
            [1, 0, 1, 1, 0, 1, 0, 1, -1],  # gaps
            [0, 0, 0, 0, 0, 0, 0, 0, -1],  # nothing
        ],
        dtype=torch.int32,
    )
    q_len, seen = 5, 8
    q = torch.randn(6, q_len, 2, 8, dtype=torch.float64)
    k, v = (torch.randn(6, 9, 1, 8, dtype=torch.float64) for _ in range(2))
    k, v = k.expand(-1, -1, 2, -1), v.expand(-1, -1, 2, -1)
    packing = packing_of(numbers, 6, q_len)
    # Of each sequence with queries: these, and all of its keys.
    assert packing.q_lens == [4, 3, 4, 4, 1, 3]
    assert packing.kv_lens == [5, 6, 5, 4, 1, 5]
    starts = packing.sequences(q.device)
    assert starts["cu_seqlens_q"].tolist() == [0, 4, 7, 11, 15, 16, 19]
    assert starts["cu_seqlens_k"].tolist() == [0, 5, 11, 16, 20, 21, 26]
    assert (starts["max_seqlen_q"], starts["max_seqlen_k"]) == (4, 6)
    packed = [packing.queries.take(q).split(packing.q_lens)]
    packed += [packing.keys.take(x).split(packing.kv_lens) for x in (k, v)]
    attended = [
        _causal_attention(*(x[None] for x in each))[0] for each in zip(*packed, strict=True)
    ]
    out = packing.queries.put(torch.cat(attended), q)
    for row in range(6):
        for query in range(q_len):
            position = seen - q_len + query
            own = int(numbers[row, position])
            if own == 0:
                assert not out[row, query].any()
                continue
            keys = [j for j in range(position + 1) if int(numbers[row, j]) == own]
            expected = _causal_attention(
                q[row, None, query, None], k[row, None, keys], v[row, None, keys]
            )
            torch.testing.assert_close(out[row, query], expected[0, 0])


def test_prompts_that_fill_a_row_are_not_copied():
    q = torch.randn(1, 8, 1, 8)
    packing = packing_of(torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3]], dtype=torch.int32), 1, 8)
    assert packing.q_lens == packing.kv_lens == [3, 2, 3]
    taken = packing.queries.take(q)
    assert taken.data_ptr() == q.data_ptr() and taken.shape == (8, 1, 8)
    assert packing.queries.put(taken, q).data_ptr() == q.data_ptr()


def test_one_row_stands_for_all():
    packing = packing_of(torch.tensor([[0, 1, 1, -1]], dtype=torch.int32), 3, 2)
    assert packing.q_lens == packing.kv_lens == [2, 2, 2]
    assert packing.queries.rows.tolist() == [0, 0, 1, 1, 2, 2]
    assert packing.keys.columns.tolist() == [1, 2] * 3


def test_numbers_may_come_in_any_order():
    packing = packing_of(torch.tensor([[2, 2, 1, 2, 1]], dtype=torch.int32), 1, 2)
    assert packing.q_lens == [1, 1] and packing.kv_lens == [2, 3]
    assert packing.keys.columns.tolist() == [2, 4, 0, 1, 3]
    assert packing.queries.columns.tolist() == [1, 0]


def test_a_row_that_is_all_padding_gets_zeros():
    packing = packing_of(torch.zeros(1, 8, dtype=torch.int32), 1, 5)
    assert packing.q_lens == [] and packing.kv_lens == []
    q, k = torch.randn(1, 5, 2, 64), torch.randn(1, 8, 1, 64)
    out = attend_packed(q, k, k, packing, Settings(), Rule(None, None, None), None)
    assert_same_bits(out, torch.zeros_like(q))
