"""Tiny random models for the transformers hook, and what they are compared with."""

import copy
import inspect

import pytest
import torch
from tolerance import assert_close, assert_same_bits, to_numpy

# Tests take both from here, so that they are skipped where they are missing.
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hf = pytest.importorskip("proxyattn.hf")

#: Every block is read, by prompts of 128 tokens already.
EXACT = {"gamma": 1.0, "min_seqlen": 128}
#: Few blocks are read.
THIN = {"gamma": 0.3, "min_budget": 0, "block_size": 64, "min_seqlen": 128}
# What forward calls the cache; newer releases have a shorter name.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)


def tiny_model(family, device, dtype=None, implementation="proxyattn", settings=EXACT, **changes):
    """Two layers, 4 query and 2 kv heads of 64, random weights large enough to attend unevenly."""
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{family}Config")(**{**sizes, **changes})
    hf.register(**settings)
    config._attn_implementation = implementation
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.to(device, dtype).eval()


def prompt(device, length=400, batch=1):
    random = torch.Generator().manual_seed(2)
    return torch.randint(1, 128, (batch, length), generator=random).to(device)


def padded(ids, left=(), right=()):
    """An attention mask: so many tokens of each row are padding, row 0 first."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(left):
        mask[row, :count] = 0
    for row, count in enumerate(right):
        mask[row, ids.shape[1] - count :] = 0
    return mask


def new_cache(kind, model, capacity=512):
    if kind == "dynamic":
        return transformers.DynamicCache(config=model.config)
    return transformers.StaticCache(config=model.config, max_cache_len=capacity)


@torch.no_grad()
def logits_of(model, implementation, ids, **arguments):
    model.set_attn_implementation(implementation)
    return model(ids, **arguments).logits


@torch.no_grad()
def chunked_logits(model, implementation, chunks, cache, attention_mask=None):
    """Logits of all chunks, one forward pass each."""
    model.set_attn_implementation(implementation)
    logits, seen = [], 0
    for chunk in chunks:
        seen += chunk.shape[1]
        mask = None if attention_mask is None else attention_mask[:, :seen]
        logits.append(model(chunk, attention_mask=mask, **{CACHE: cache}).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def assert_like_sdpa(model, actual, ids, **arguments):
    """Within twice SDPA's own error against float64, where there are tokens."""
    exact = copy.deepcopy(model).double()
    reference = logits_of(exact, "sdpa", ids, **arguments)
    plain = logits_of(model, "sdpa", ids, **arguments)
    mask = arguments.get("attention_mask")
    if mask is not None:
        actual, reference, plain = (x[mask.bool()] for x in (actual, reference, plain))
    assert_close(actual, to_numpy(reference), plain, "logits")


def assert_same_reading(recorded, single):
    """Logits of a forward pass that was recorded and of one that was not. On a GPU heads that read
    every block may do so in another order, and where a later layer ranks blocks alike the rounding
    decides between them, for a few tokens."""
    if recorded.device.type == "cpu":
        assert_same_bits(recorded, single)
        return
    unit = torch.finfo(recorded.dtype).eps * float(single.abs().max())
    off = (recorded - single).abs().amax(-1) > 4 * unit
    assert off.double().mean() <= 0.05


def sparse_layers(recording):
    return [call.layer for call in recording.sparse]
