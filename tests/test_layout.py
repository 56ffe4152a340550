"""Tensors that come as [batch, heads, tokens, head_dim]: named where the shapes give it away."""

import proxyattn
import pytest
import torch
from arguments import message_of

RULE = "must have shape [batch, tokens, heads, head_dim], got"
OTHER = "as [batch, heads, tokens, head_dim]"


def refusal(device, q, k, v=None, causal=True):
    """What all ops say of (tokens, heads) in the order of the dimensions."""
    shapes = q, k, k if v is None else v
    tensors = [torch.zeros(1, *s, 64, dtype=torch.bfloat16, device=device) for s in shapes]
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    calls = {
        "proxy_attention": lambda: proxyattn.proxy_attention(*tensors, causal=causal),
        "block_sparse_attention": lambda: proxyattn.block_sparse_attention(
            *tensors, lists, lists[0], causal=causal
        ),
    }
    if v is None:
        calls["choose_blocks"] = lambda: proxyattn.choose_blocks(*tensors[:2], causal=causal)
        calls["estimate_shares"] = lambda: proxyattn.estimate_shares(*tensors[:2], causal=causal)
    texts = set()
    for op, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message_of(error).startswith(f"{op}: ")
        texts.add(message_of(error).removeprefix(f"{op}: "))
    (text,) = texts
    return text


def test_all_exchanged(device):
    """Grouped heads: more query heads than key heads would be queries before the first key."""
    assert refusal(device, (32, 300), (8, 300)) == (
        f"q and k {RULE} [1, 32, 300, 64] and [1, 8, 300, 64], which fit {OTHER}"
    )
    # A chunk after a prefix: 300 tokens don't divide 200.
    assert refusal(device, (4, 200), (4, 300)) == (
        f"q and k {RULE} [1, 4, 200, 64] and [1, 4, 300, 64], which fit {OTHER}"
    )
    assert "which fit" in refusal(device, (4, 200), (4, 300), causal=False)


def test_one_exchanged(device):
    assert refusal(device, (300, 4), (2, 300)) == (
        f"k {RULE} [1, 2, 300, 64], which fits q {OTHER}"
    )
    assert refusal(device, (7, 300), (300, 7)) == (
        f"q {RULE} [1, 7, 300, 64], which fits k {OTHER}"
    )
    assert refusal(device, (300, 4), (300, 2), (2, 300)) == (
        "v must have the layout of k, [batch, tokens, heads, head_dim], got shape "
        "[1, 2, 300, 64] with k of shape [1, 300, 2, 64]"
    )


def test_plainly_wrong_shapes_keep_their_words(device):
    assert refusal(device, (300, 4), (200, 4)) == (
        "q_len must be at most kv_len when causal, got q_len=300, kv_len=200"
    )
    assert refusal(device, (300, 4), (300, 3)) == (
        "kv_heads must divide q_heads, got q_heads=4, kv_heads=3"
    )
    assert refusal(device, (300, 4), (300, 2), (299, 2)) == (
        "v must have shape [1, 300, 2, 64], got shape [1, 299, 2, 64]"
    )


def test_what_can_be_right_is_taken(device):
    """More heads than tokens is a short prompt: nothing tells it from an exchanged long one."""
    q = torch.randn(1, 4, 300, 64).to(torch.bfloat16).to(device)
    out = proxyattn.proxy_attention(q, q, q)
    assert out.shape == q.shape
