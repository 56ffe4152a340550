"""What each head needs of packed keys that several thread blocks share out, through the lists that
follow from it. Shorter ones are test_varlen.py's."""

import proxyattn
import pytest
import torch
from packs import PAGES, random_pack

#: Keys of many chunks and of less than one, queries of a whole block and of less, and starts that
#: are no multiple of anything.
LONG = [(70, 5000), (0, 300), (1, 1), (300, 2055), (64, 1024), (17, 9001), (129, 129)]


def estimate_cases():
    """(heads, head_dim, block_size, page, causal), every value of each axis in a few of them."""
    heads = ((8, 2), (4, 4), (7, 1))
    places = (None, *PAGES)
    return [
        (heads[(i + i // 6) % 3], head_dim, block_size, places[(i + i // 6) % 6], i % 4 != 3)
        for i, (head_dim, block_size) in enumerate(
            (d, b) for _ in range(3) for b in (64, 128) for d in (64, 128, 256)
        )
    ]


def case_name(case):
    (q_heads, kv_heads), head_dim, block_size, page, causal = case
    where = "packed" if page is None else f"pages{page}"
    mask = "causal" if causal else "full"
    return f"h{q_heads}x{kv_heads}-d{head_dim}-k{block_size}-{where}-{mask}"


estimates = pytest.mark.parametrize("case", estimate_cases(), ids=case_name)


def needs_alone(estimate, pack, *settings):
    """[S, Hq]: of each sequence in a call of its own. One without queries needs nothing."""
    q_heads = pack.tensors["q"].shape[1]
    nothing = torch.zeros(1, q_heads, device=pack.tensors["q"].device)
    return torch.cat(
        [estimate(q, k, *settings) if q.shape[1] else nothing for q, k, _ in pack.sequences]
    )


@estimates
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_shares_have_the_bits_of_the_sequences_one_by_one(cuda, case, dtype):
    """Lists are those that shares of dense calls, handed in, would give."""
    heads, head_dim, block_size, page, causal = case
    pack = random_pack(cuda, LONG, heads, head_dim, dtype, page, seed=head_dim + block_size)
    used = pack.rows(len(LONG) - 1, block_size).stop  # of lists: behind them is no sequence's
    shares = needs_alone(proxyattn.estimate_shares, pack, block_size, causal)
    for gamma in (0.2, 0.4, 0.6, 0.8, 0.9, 0.95):
        settings = {"gamma": gamma, "min_budget": 0, "block_size": block_size, "causal": causal}
        got = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings)
        want = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings, shares=shares)
        for pair in zip(got, want, strict=True):
            first, second = (lists[:, :used] for lists in pair)
            assert torch.equal(first, second), f"gamma {gamma}"


@estimates
@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9])
def test_budgets_are_those_of_the_sequences_one_by_one(cuda, case, gamma):
    """A last query block sees every key block, so that its counts are the budgets."""
    heads, head_dim, block_size, page, causal = case
    pack = random_pack(cuda, LONG, heads, head_dim, page=page, seed=head_dim + block_size)
    budgets = needs_alone(proxyattn.estimate_budgets, pack, gamma, block_size, causal)
    settings = {"budget_mode": "last_block", "num_sink_blocks": 0, "num_local_blocks": 0}
    settings |= {"gamma": gamma, "min_budget": 0, "block_size": block_size, "causal": causal}
    _, counts = proxyattn.choose_blocks_varlen(**pack.estimate_arguments, **settings)
    for i, (q_len, _) in enumerate(LONG):
        if q_len == 0:
            continue
        assert torch.equal(counts[:, pack.rows(i, block_size)][:, -1], budgets[i].int())
