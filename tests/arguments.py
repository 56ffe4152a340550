"""Arguments that every op takes, for tests that then spoil one of them."""

import re

import proxyattn
import pytest
import torch

OPS = (
    "pool_heads",
    "score_blocks",
    "estimate_budgets",
    "estimate_shares",
    "select_blocks",
    "block_sparse_attention",
    "choose_blocks",
    "proxy_attention",
)
#: Those that work out lists from queries and keys, with the same settings.
PIPELINES = ("choose_blocks", "proxy_attention")


def good_arguments(op, device):
    """Arguments that the function of this name takes: 100 queries, 200 keys, 4 and 2 heads."""

    def tokens(count, heads):
        return torch.zeros(2, count, heads, 64, dtype=torch.bfloat16, device=device)

    def int32(*shape):
        return torch.ones(shape, dtype=torch.int32, device=device)

    q, k = tokens(100, 4), tokens(200, 2)
    lengths = {"q_len": 100, "kv_len": 200, "block_size": 64}
    scores = torch.ones(2, 2, 2, 4, device=device)
    settings = {"gamma": 0.5, "min_budget": 0}
    return {
        "pool_heads": {"q": q, "k": k, "num_proxy_heads": 2, "stride": 4},
        "score_blocks": {"q_proxy": tokens(25, 2), "k_proxy": tokens(50, 2), **lengths},
        "estimate_budgets": {"q": q, "k": k},
        "estimate_shares": {"q": q, "k": k},
        "select_blocks": {
            "peak": scores,
            "mass": scores,
            "needs": torch.zeros(2, 4, device=device),
            **lengths,
            "num_heads": 4,
        },
        "block_sparse_attention": {
            "q": q,
            "k": k,
            "v": tokens(200, 2),
            "indices": int32(2, 2, 2, 4),
            "counts": int32(2, 4, 2),
            "block_size": 64,
        },
        "choose_blocks": {"q": q, "k": k, **settings},
        "proxy_attention": {"q": q, "k": k, "v": tokens(200, 2), **settings},
    }[op]


def all_tensors(op, device):
    """Good arguments with those tensors too that may be left out."""
    arguments = good_arguments(op, device)
    if op in PIPELINES:
        arguments["shares"] = torch.zeros(2, 4, device=device)
    return arguments


def message_of(error):
    """The sentence, without the C++ trace that torch may add."""
    return str(error.value).split("\nException raised from")[0]


def smallest_workspace(arguments, limit=0, op="proxy_attention"):
    """Bytes that one of PIPELINES needs at least, by its own word when it is given less."""
    with pytest.raises(ValueError) as error:
        getattr(proxyattn, op)(**arguments, max_workspace_bytes=limit)
    needed = int(re.search(r"at least (\d+)", message_of(error))[1])
    assert message_of(error) == (
        f"{op}: max_workspace_bytes must be at least {needed}, got max_workspace_bytes={limit}"
    )
    return needed
