"""Arguments that every op takes, for tests that then spoil one of them."""

import re

import proxyattn
import pytest
import torch

OPS = (
    "pool_heads",
    "score_blocks",
    "estimate_budgets",
    "select_blocks",
    "block_sparse_attention",
    "proxy_attention",
)


def good_arguments(op, device):
    """Arguments that the function of this name takes: 100 queries, 200 keys, 4 and 2 heads."""

    def tokens(count, heads):
        return torch.zeros(2, count, heads, 64, dtype=torch.bfloat16, device=device)

    def int32(*shape):
        return torch.ones(shape, dtype=torch.int32, device=device)

    q, k = tokens(100, 4), tokens(200, 2)
    lengths = {"q_len": 100, "kv_len": 200, "block_size": 64}
    scores = torch.ones(2, 2, 2, 4, device=device)
    return {
        "pool_heads": {"q": q, "k": k, "num_proxy_heads": 2, "stride": 4},
        "score_blocks": {"q_proxy": tokens(25, 2), "k_proxy": tokens(50, 2), **lengths},
        "estimate_budgets": {"q": q, "k": k},
        "select_blocks": {"peak": scores, "mass": scores, "budgets": int32(2, 4), **lengths},
        "block_sparse_attention": {
            "q": q,
            "k": k,
            "v": tokens(200, 2),
            "indices": int32(2, 2, 2, 4),
            "counts": int32(2, 4, 2),
            "block_size": 64,
        },
        "proxy_attention": {"q": q, "k": k, "v": tokens(200, 2), "gamma": 0.5, "min_budget": 0},
    }[op]


def message_of(error):
    """The sentence, without the C++ trace that torch may add."""
    return str(error.value).split("\nException raised from")[0]


def smallest_workspace(arguments, limit=0):
    """Bytes that proxy_attention needs at least, by its own word when it is given less."""
    with pytest.raises(ValueError) as error:
        proxyattn.proxy_attention(**arguments, max_workspace_bytes=limit)
    needed = int(re.search(r"at least (\d+)", message_of(error))[1])
    assert message_of(error) == (
        f"proxy_attention: max_workspace_bytes must be at least {needed}, "
        f"got max_workspace_bytes={limit}"
    )
    return needed
