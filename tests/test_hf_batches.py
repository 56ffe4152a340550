"""Padded batches, prompts in chunks, caches and generation: sparse, and the numbers of SDPA."""

import copy

import pytest
import torch
from hf_tiny import (
    CACHE,
    EXACT,
    THIN,
    assert_like_sdpa,
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
from tolerance import assert_close, assert_same_bits, to_numpy

CACHES = pytest.mark.parametrize("kind", ["dynamic", "static"])


def shapes(recording, layer=0):
    """(rows, queries, keys) of a layer's sparse calls."""
    return [
        (call.counts.shape[0], call.q_len, call.kv_len)
        for call in recording.sparse
        if call.layer == layer
    ]


# ---- padding


def test_a_mask_without_padding_is_sparse(device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=torch.ones_like(ids))
    assert sparse_layers(recording) == [0, 1] and not recording.dense
    assert_like_sdpa(model, actual, ids)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_padded_rows_run_sparse(family, device):
    model, ids = tiny_model(family, device), prompt(device, batch=5)
    mask = padded(ids, left=(30, 0, 30), right=(0, 0, 0, 20))
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=mask)
    assert not recording.dense
    lengths = [370, 400, 370, 380, 400]
    expected = [(1, length, length) for length in lengths]
    assert shapes(recording) == shapes(recording, 1) == expected
    assert_like_sdpa(model, actual, ids, attention_mask=mask)
    assert_like_sdpa(
        model, logits_of(model, "proxyattn", ids, attention_mask=mask), ids, attention_mask=mask
    )


def test_a_padded_row_is_attended_to_as_if_alone(device):
    hf.register(**THIN)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(2, 4, 400, 64, dtype=dtype, device=device) for _ in range(3))
    mask = transformers.AttentionMaskInterface()["proxyattn"](
        batch_size=2,
        q_length=400,
        kv_length=400,
        q_offset=0,
        mask_function=transformers.masking_utils.causal_mask_function,
        attention_mask=padded(torch.zeros(2, 400, device=device), left=(30,), right=(0, 20)).bool(),
        device=device,
    )
    attention = transformers.AttentionInterface()["proxyattn"]
    out, _ = attention(torch.nn.Module().eval(), q, k, v, mask)
    for row, start, end in ((0, 30, 400), (1, 0, 380)):
        alone = (x[row : row + 1, :, start:end] for x in (q, k, v))
        expected, _ = attention(torch.nn.Module().eval(), *alone, None)
        assert_same_bits(out[row : row + 1, start:end], expected)
        assert not out[row, :start].any() and not out[row, end:].any()


def test_padded_short_prompts_are_dense(device):
    model, ids = tiny_model("Llama", device), prompt(device, 127, batch=2)
    mask = padded(ids, left=(30,))
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=mask)
    assert recording.dense == {(0, "short"): 1, (1, "short"): 1} and not recording.sparse
    assert_same_bits(actual, logits_of(model, "sdpa", ids, attention_mask=mask))


def test_padding_hides_itself_from_windows(device):
    changes = {"sliding_window": 100, "layer_types": ["sliding_attention", "full_attention"]}
    model = tiny_model("Qwen2", device, use_sliding_window=True, max_window_layers=1, **changes)
    ids = prompt(device, batch=2)
    mask = padded(ids, left=(30,))
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=mask)
    assert recording.dense == {(0, "window"): 1}
    assert shapes(recording, 1) == [(1, 370, 370), (1, 400, 400)]
    assert_like_sdpa(model, actual, ids, attention_mask=mask)


def test_padding_with_gradients_is_that_of_sdpa(device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    mask = padded(ids, left=(30,))
    model.set_attn_implementation("proxyattn")
    with hf.record() as recording:
        actual = model(ids, attention_mask=mask).logits
    assert recording.dense == {(0, "gradient"): 1, (1, "gradient"): 1}
    assert_same_bits(actual, logits_of(model, "sdpa", ids, attention_mask=mask))


@pytest.mark.parametrize("cuts", [(), (200,), (1, 130, 399)])
def test_packed_sequences_are_sparse(cuts, device):
    """Prompts in one row, each with positions of its own."""
    model, ids = tiny_model("Llama", device), prompt(device)
    lengths = [end - start for start, end in zip((0, *cuts), (*cuts, 400), strict=True)]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    arguments = {"position_ids": positions, "use_cache": False}
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, **arguments)
    assert not recording.dense
    assert shapes(recording) == shapes(recording, 1) == [(1, n, n) for n in lengths]
    assert_like_sdpa(model, actual, ids, **arguments)
    assert_like_sdpa(model, logits_of(model, "proxyattn", ids, **arguments), ids, **arguments)


# ---- windows


def test_a_window_that_holds_the_prompt_is_sparse(device):
    model, ids = tiny_model("Mistral", device, sliding_window=400), prompt(device, batch=2)
    mask = padded(ids, left=(30,))
    for arguments in ({}, {"attention_mask": mask}):
        with hf.record() as recording:
            actual = logits_of(model, "proxyattn", ids, **arguments)
        assert set(sparse_layers(recording)) == {0, 1} and not recording.dense
        assert_like_sdpa(model, actual, ids, **arguments)


# ---- chunks


@CACHES
def test_chunks_of_a_prompt_are_sparse(kind, device):
    model, ids = tiny_model("Llama", device), prompt(device)
    chunks = ids.split([150, 130, 64, 56], dim=1)
    with hf.record() as recording:
        actual = chunked_logits(model, "proxyattn", chunks, new_cache(kind, model))
    # A chunk is as long as what it sees; but few queries are few.
    assert shapes(recording) == [(1, 150, 150), (1, 130, 280), (1, 64, 344)]
    assert recording.dense == {(0, "short"): 1, (1, "short"): 1}
    assert_like_sdpa(model, actual, ids)


@CACHES
def test_chunks_of_a_padded_prompt_are_sparse(kind, device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    chunks, mask = ids.split([150, 150, 100], dim=1), padded(ids, left=(170,))
    with hf.record() as recording:
        actual = chunked_logits(model, "proxyattn", chunks, new_cache(kind, model), mask)
    assert shapes(recording) == [
        (1, 150, 150),  # the first chunk of row 0 is all padding
        (1, 130, 130),
        (1, 150, 300),
        (1, 100, 230),
        (1, 100, 400),
    ]
    exact = copy.deepcopy(model).double()
    reference = chunked_logits(exact, "sdpa", chunks, new_cache(kind, exact), mask)
    plain = chunked_logits(model, "sdpa", chunks, new_cache(kind, model), mask)
    real = mask.bool()
    assert_close(actual[real], to_numpy(reference[real]), plain[real], "logits")


@CACHES
def test_generate_prefills_in_chunks(kind, device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    settings["attention_mask"] = padded(ids, left=(30,))
    tokens = {}
    for name in ("sdpa", "proxyattn"):
        model.set_attn_implementation(name)
        with hf.record() as recording:
            tokens[name] = model.generate(
                ids, cache_implementation=kind, prefill_chunk_size=100, **settings
            )
    lengths = [seen for _, _, seen in shapes(recording)]
    if kind == "static" and device == "cuda":  # generate compiles it, for any length of prompt
        assert lengths == [70, 100, 170, 200, 270, 300, 370, 400]
    else:
        assert lengths == [170, 200, 270, 300, 370, 400]
        assert recording.dense == {(0, "short"): 3, (1, "short"): 3}
    if device == "cpu":  # rounding decides between tokens in bfloat16
        assert torch.equal(tokens["proxyattn"], tokens["sdpa"])


def test_a_chunk_that_needs_gradients_gets_its_mask(device):
    model, ids = tiny_model("Llama", device), prompt(device)
    model.set_attn_implementation("proxyattn")
    cache = new_cache("dynamic", model)
    with hf.record() as recording:
        with torch.no_grad():
            first = model(ids[:, :150], **{CACHE: cache}).logits
        second = model(ids[:, 150:], **{CACHE: cache}).logits
    assert recording.dense == {(0, "gradient"): 1, (1, "gradient"): 1}
    assert_like_sdpa(model, torch.cat([first, second.detach()], dim=1), ids)


def test_layers_of_different_lengths_are_refused(device):
    """SDPA raises too, for a mask of another size."""
    model, ids = tiny_model("Llama", device), prompt(device, 100)
    cache = new_cache("dynamic", model)
    for layer, length in enumerate((300, 400)):
        states = torch.randn(1, 2, length, 64, device=device, dtype=model.dtype)
        cache.update(states, states, layer)
    model.set_attn_implementation("proxyattn")
    with (
        pytest.raises(ValueError, match=r"key must have the 400 tokens .* got 500"),
        torch.no_grad(),
    ):
        model(ids, **{CACHE: cache})


@pytest.mark.parametrize("attention_mask", [False, True])
@pytest.mark.parametrize("min_seqlen", [128, 1000])
def test_queries_that_a_model_cuts_see_the_whole_prompt(min_seqlen, attention_mask, device):
    """Gemma 4's last layers get the queries of the wanted logits alone."""
    config = transformers.Gemma4TextConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=64,
        global_head_dim=64,
        vocab_size_per_layer_input=128,
        hidden_size_per_layer_input=32,
    )
    hf.register(gamma=1.0, min_seqlen=min_seqlen)
    config._attn_implementation = "proxyattn"
    torch.manual_seed(1)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = transformers.Gemma4ForCausalLM(config).to(device, dtype).eval()
    ids = prompt(device, 200)
    arguments = {"logits_to_keep": 2}
    if attention_mask:
        arguments["attention_mask"] = torch.ones_like(ids)
    actual = logits_of(model, "proxyattn", ids, **arguments)
    reference = logits_of(copy.deepcopy(model).double(), "sdpa", ids)[:, -2:]
    plain = logits_of(model, "sdpa", ids)[:, -2:]
    assert_close(actual, to_numpy(reference), plain, "logits")


@CACHES
def test_decoding_after_a_sparse_prefill(kind, device):
    model, ids = tiny_model("Llama", device), prompt(device)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    model.set_attn_implementation("proxyattn")
    with hf.record() as recording:
        tokens = model.generate(ids, cache_implementation=kind, **settings)
    assert sparse_layers(recording) == [0, 1]
    assert recording.dense == {(0, "short"): 7, (1, "short"): 7}
    # Greedy tokens follow from logits that SDPA's would agree with.
    logits = logits_of(model, "sdpa", tokens)[:, 399:-1].float()
    chosen = logits.gather(2, tokens[:, 400:, None])[..., 0]
    slack = 1e-4 if device == "cpu" else 0.05 * float(logits.std())
    assert tokens.shape == (1, 408)
    assert (chosen >= logits.amax(2) - slack).all()


def test_the_settings_of_chunks_are_those_registered(device):
    model = tiny_model("Llama", device)
    hf.register(**{**EXACT, "min_seqlen": 20})
    ids = prompt(device, 60)
    with hf.record() as recording:
        chunked_logits(model, "proxyattn", ids.split([19, 20, 21], 1), new_cache("dynamic", model))
    assert shapes(recording) == [(1, 20, 39), (1, 21, 60)]
