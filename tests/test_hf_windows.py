"""Sliding windows and learned sinks in the transformers hook: dense inside the window, without a
mask, and with a sink in every row, whatever runs it."""

import copy

import proxyattn
import pytest
import torch
from hf_tiny import (
    THIN,
    assert_like_sdpa,
    assert_same_reading,
    chunked_logits,
    hf,
    logits_of,
    new_cache,
    padded,
    prompt,
    sparse_layers,
    tiny_model,
    transformers,
)
from proxyattn.hf._causal import causal_sign, dense_mask, read_sign
from tolerance import assert_close, assert_same_bits, to_numpy
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

CACHES = pytest.mark.parametrize("kind", ["dynamic", "static"])
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}


def windowed(device, window=100, **changes):
    return tiny_model("Mistral", device, sliding_window=window, **changes)


def gpt_oss(device, window=100, **changes):
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": window, **BOTH}
    model = tiny_model("GptOss", device, **{**sizes, **changes})
    model.config._experts_implementation = "eager"  # the default has no float64
    for layer in model.model.layers:  # sinks that matter
        layer.self_attn.sinks.data = torch.tensor([-1.0, 0.0, 2.0, 4.0], dtype=model.dtype).to(
            device
        )
    return model


def eager_of(model):
    """A copy whose attention is transformers' own, which sinks and windows are the same to."""
    copied = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


# ---- windows


@pytest.mark.parametrize("window", [1, 64, 100, 399])
def test_a_window_that_hides_keys_runs_inside_it(device, window):
    model, ids = windowed(device, window), prompt(device)
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids)
    assert recording.dense == {(0, "window"): 1, (1, "window"): 1}
    assert_like_sdpa(model, actual, ids)


def test_layers_without_a_window_stay_sparse(device):
    changes = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 100, **BOTH}
    model, ids = tiny_model("Qwen2", device, **changes), prompt(device)
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids)
    assert recording.dense == {(0, "window"): 1}
    assert sparse_layers(recording) == [1]
    assert_like_sdpa(model, actual, ids)


def test_thin_settings_leave_windows_dense(device):
    """Few blocks are read where there is no window; inside one all are."""
    model, ids = windowed(device), prompt(device)
    hf.register(**THIN)
    assert_like_sdpa(model, logits_of(model, "proxyattn", ids), ids)


@CACHES
def test_chunks_inside_windows(kind, device):
    """Caches of windowed layers drop keys; chunks see what is left of them."""
    model, ids = windowed(device), prompt(device)
    chunks = ids.split([150, 130, 120], dim=1)
    with hf.record() as recording:
        actual = chunked_logits(model, "proxyattn", chunks, new_cache(kind, model))
    assert recording.dense == {(0, "window"): 3, (1, "window"): 3}
    exact = copy.deepcopy(model).double()
    reference = chunked_logits(exact, "sdpa", chunks, new_cache(kind, exact))
    plain = chunked_logits(model, "sdpa", chunks, new_cache(kind, model))
    assert_close(actual, to_numpy(reference), plain, "logits")


@CACHES
def test_padded_chunks_inside_windows(kind, device):
    model, ids = windowed(device), prompt(device, batch=2)
    chunks, mask = ids.split([150, 150, 100], dim=1), padded(ids, left=(170,))
    actual = chunked_logits(model, "proxyattn", chunks, new_cache(kind, model), mask)
    exact = copy.deepcopy(model).double()
    reference = chunked_logits(exact, "sdpa", chunks, new_cache(kind, exact), mask)
    plain = chunked_logits(model, "sdpa", chunks, new_cache(kind, model), mask)
    real = mask.bool()
    assert_close(actual[real], to_numpy(reference[real]), plain[real], "logits")


def test_a_static_cache_that_is_not_full(device):
    """A window that the prompt reaches, in a cache with room behind it."""
    model, ids = windowed(device, window=300), prompt(device)
    chunks = ids.split([200, 200], dim=1)
    with hf.record() as recording:
        actual = chunked_logits(model, "proxyattn", chunks, new_cache("static", model))
    assert recording.dense == {(0, "window"): 1, (1, "window"): 1}
    assert_like_sdpa(model, actual, ids)


def test_padding_inside_a_row_needs_the_mask(device):
    """A window counts padded tokens, too."""
    model, ids = windowed(device), prompt(device)
    mask = torch.ones_like(ids)
    mask[0, 180:220] = 0
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=mask)
    assert recording.dense == {(0, "mask"): 1, (1, "mask"): 1}
    assert_like_sdpa(model, actual, ids, attention_mask=mask)


def test_training_inside_a_window_is_that_of_sdpa(device):
    model, ids = windowed(device), prompt(device)
    gradients = {}
    for name in ("sdpa", "proxyattn"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids).logits.float().square().sum().backward()
        gradients[name] = [parameter.grad.clone() for parameter in model.parameters()]
    for got, want in zip(gradients["proxyattn"], gradients["sdpa"], strict=True):
        assert_same_bits(got, want)


def test_no_mask_is_made(device, monkeypatch):
    """Only signs, which hold nothing: a mask of a long prompt would not fit into memory."""
    model, ids = windowed(device, **BOTH), prompt(device)

    def no_mask(**arguments):
        raise AssertionError("a mask was made")

    monkeypatch.setattr("proxyattn.hf._hook.sdpa_mask", no_mask)
    monkeypatch.setattr("proxyattn.hf._hook.dense_mask", no_mask)
    logits_of(model, "proxyattn", ids)


def test_compiled_windows(device):
    model, ids = windowed(device), prompt(device)
    want = logits_of(model, "proxyattn", ids)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert_same_bits(compiled(ids).logits, want)
        with hf.record() as recording:
            assert_same_bits(compiled(ids).logits, want)
    assert recording.dense == {(0, "window"): 1, (1, "window"): 1}


# ---- the sign of a window's mask


CONFIG = transformers.MistralConfig(sliding_window=100)
ARGUMENTS = {
    "batch_size": 2,
    "q_length": 150,
    "kv_length": 280,
    "q_offset": 130,
    "mask_function": sliding_window_causal_mask_function(100),
    "local_size": 100,
    "config": CONFIG,
}


def _padding(left=0, right=0, length=280):
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, :left] = False
    mask[1, length - right :] = False
    return mask


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_length": 249, "kv_offset": 31},
        {"kv_length": 300},
        {"attention_mask": _padding()},
        {"attention_mask": _padding(left=200, right=20)},
        {"attention_mask": _padding(left=20), "kv_length": 249, "kv_offset": 31},
        {"attention_mask": _padding(left=90), "kv_length": 249, "kv_offset": 31},
    ],
    ids="-".join,
)
def test_a_sign_stands_for_the_mask_of_a_window(changes):
    arguments = {**ARGUMENTS, **changes}
    causal = read_sign(causal_sign(**arguments))
    assert causal.window == 100
    got = dense_mask(causal, 150, torch.device("cpu"))
    want = sdpa_mask(**arguments)
    assert torch.equal(got.expand_as(want), want)


@pytest.mark.parametrize(
    "changes",
    [
        {"allow_is_causal_skip": False},
        {"attention_mask": _padding() & (torch.arange(280) != 100)},
        {
            "config": transformers.Llama4TextConfig(attention_chunk_size=100),
            "mask_function": chunked_causal_mask_function(100, torch.zeros(2, dtype=torch.int)),
        },
        {"config": None},
        {"local_size": None, "mask_function": causal_mask_function, "kv_offset": 5},
        {"q_length": 1, "q_offset": 279},
    ],
    ids="-".join,
)
def test_other_masks_get_no_sign(changes):
    assert causal_sign(**{**ARGUMENTS, **changes}) is None


# ---- sinks


def assert_like_eager(model, actual, ids, attention_mask=None):
    exact = eager_of(model).double()
    with torch.no_grad():
        reference = exact(ids, attention_mask=attention_mask).logits
        plain = eager_of(model)(ids, attention_mask=attention_mask).logits
    if attention_mask is not None:
        real = attention_mask.bool()
        actual, reference, plain = actual[real], reference[real], plain[real]
    assert_close(actual, to_numpy(reference), plain, "logits")


@pytest.mark.parametrize("length", [400, 100], ids=["long", "short"])
@pytest.mark.parametrize("left", [0, 30])
def test_sinks_whole_and_padded(device, length, left):
    model, ids = gpt_oss(device), prompt(device, length, batch=2)
    mask = padded(ids, left=(left,)) if left else None
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=mask)
    if length == 400:
        assert recording.dense == {(0, "window"): 1}
        assert set(sparse_layers(recording)) == {1}
    else:
        assert recording.dense == {(0, "short"): 1, (1, "short"): 1}
    assert_like_eager(model, actual, ids, mask)


@CACHES
def test_sinks_in_chunks_and_while_decoding(kind, device):
    model, ids = gpt_oss(device), prompt(device)
    chunks = ids.split([150, 130, 116, 1, 1, 2], dim=1)
    actual = chunked_logits(model, "proxyattn", chunks, new_cache(kind, model))
    exact = copy.deepcopy(model).double()
    reference = chunked_logits(exact, "eager", chunks, new_cache(kind, exact))
    plain = chunked_logits(model, "eager", chunks, new_cache(kind, model))
    assert_close(actual, to_numpy(reference), plain, "logits")


def test_sinks_with_chosen_blocks(device):
    """The full layer reads few blocks; what it reads has the sink in each row."""
    model, ids = gpt_oss(device), prompt(device, 1000)
    hf.register(**THIN)
    with hf.record() as recording:
        with_sinks = logits_of(model, "proxyattn", ids)
    assert recording.share < 0.9
    assert_same_reading(with_sinks, logits_of(model, "proxyattn", ids))
    for layer in model.model.layers:
        layer.self_attn.sinks.data.fill_(-torch.inf)
    assert not torch.equal(with_sinks, logits_of(model, "proxyattn", ids))


def test_training_with_sinks_is_that_of_eager():
    model, ids = gpt_oss("cpu"), prompt("cpu")
    gradients = {}
    for name in ("eager", "proxyattn"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model(ids).logits.square().mean().backward()
        gradients[name] = model.model.layers[0].self_attn.sinks.grad.clone()
    assert gradients["eager"].abs().max() > 0
    torch.testing.assert_close(gradients["proxyattn"], gradients["eager"], rtol=1e-3, atol=1e-6)


def test_sinks_alone_may_need_a_gradient():
    model, ids = gpt_oss("cpu"), prompt("cpu")
    model.set_attn_implementation("proxyattn")
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_()
    with hf.record() as recording:
        model(ids).logits.square().mean().backward()
    assert recording.dense == {(0, "gradient"): 1, (1, "gradient"): 1}
    assert model.model.layers[0].self_attn.sinks.grad.abs().max() > 0


def test_the_functions_take_what_the_hook_gives():
    """One head of a layer by hand: the sink's logit is not scaled."""
    q = torch.zeros(1, 2, 1, 64)
    v = torch.ones(1, 2, 1, 64)
    out = proxyattn.proxy_attention(
        q, q, v, gamma=1.0, scale=0.5, sink_logits=torch.log(torch.tensor([3.0]))
    )
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1 / 4, 2 / 5]))
