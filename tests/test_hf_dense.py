"""What stays dense and why, the one warning that says so, and what is refused."""

import gc
import sys
from types import ModuleType

import pytest
import torch
from hf_tiny import (
    EXACT,
    hf,
    logits_of,
    padded,
    prompt,
    sparse_layers,
    tiny_model,
    transformers,
)
from tolerance import assert_close, assert_same_bits, to_numpy


@pytest.fixture
def said(caplog):
    """The hook's warnings so far."""
    return lambda: [record.message for record in caplog.records if record.name == "proxyattn"]


# ---- modes of a model


def test_a_short_prompt_is_dense(device, said):
    model, ids = tiny_model("Llama", device), prompt(device, 127)
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids)
    assert recording.dense == {(0, "short"): 1, (1, "short"): 1} and not recording.sparse
    assert_same_bits(actual, logits_of(model, "sdpa", ids))
    assert said() == []


def test_the_default_length_comes_from_the_table(device, monkeypatch):
    model, ids = tiny_model("Llama", device), prompt(device)
    hf.register()
    monkeypatch.setitem(hf.MIN_SEQLEN, device, 401)
    with hf.record() as recording:
        logits_of(model, "proxyattn", ids)
    assert not recording.sparse
    monkeypatch.setitem(hf.MIN_SEQLEN, device, 400)
    with hf.record() as recording:
        logits_of(model, "proxyattn", ids)
    assert sparse_layers(recording) == [0, 1]


def test_training_is_dense(device, said):
    model, ids = tiny_model("Llama", device), prompt(device)
    model.set_attn_implementation("proxyattn")
    with hf.record() as recording:
        model.train()(ids, labels=ids).loss.backward()
        with torch.no_grad():  # as reentrant checkpointing runs its first pass
            model(ids)
    assert recording.dense == {(0, "training"): 2, (1, "training"): 2}
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert len(said()) == 1 and "(training)" in said()[0] and "model.eval()" in said()[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_gradients_of_sdpa(reentrant):
    """To the bit, which SDPA's own gradients on a GPU are not from run to run."""
    gradients = {}
    for implementation in ("sdpa", "proxyattn"):
        model = tiny_model("Llama", "cpu", settings={**EXACT, "gamma": 0.1, "min_budget": 0})
        model.set_attn_implementation(implementation)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.model.embed_tokens.weight.requires_grad_(True)
        ids = prompt("cpu")
        model.train()(ids, labels=ids).loss.backward()
        gradients[implementation] = model.model.layers[0].self_attn.q_proj.weight.grad
    assert_same_bits(gradients["proxyattn"], gradients["sdpa"])


def test_one_trainable_parameter_makes_attention_dense(device, said):
    """An adapter, in inference without no_grad."""
    model, ids = tiny_model("Llama", device), prompt(device)
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    model.set_attn_implementation("proxyattn")
    with hf.record() as recording:
        model(ids)
    assert recording.dense == {(0, "gradient"): 1, (1, "gradient"): 1}
    (line,) = said()
    assert "LlamaAttention, layer 0 (gradient)" in line
    assert "torch.no_grad()" in line and "adapters" in line
    with hf.record() as recording, torch.no_grad():
        model(ids)
    assert sparse_layers(recording) == [0, 1]


def test_a_frozen_model_is_sparse_with_gradients_enabled(device):
    model, ids = tiny_model("Llama", device), prompt(device)
    model.requires_grad_(False)
    model.set_attn_implementation("proxyattn")
    with hf.record() as recording:
        model(ids)
    assert sparse_layers(recording) == [0, 1]


def test_autocast_is_sparse(device):
    dtype = torch.bfloat16
    model, ids = tiny_model("Llama", device, torch.float32), prompt(device, batch=2)
    mask = padded(ids, left=(30,))
    with torch.autocast(device, dtype), hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids, attention_mask=mask)
        plain = logits_of(model, "sdpa", ids, attention_mask=mask)
    assert set(sparse_layers(recording)) == {0, 1} and not recording.dense
    exact = logits_of(model.double(), "sdpa", ids, attention_mask=mask)
    real = mask.bool()
    assert actual.dtype == plain.dtype
    assert_close(actual[real], to_numpy(exact[real]), plain[real], "logits")


@pytest.mark.parametrize("length", [100, 400])
def test_modules_that_are_not_causal_are_those_of_sdpa(length, device):
    """As those who make encoders of decoders set them."""
    model, ids = tiny_model("Llama", device), prompt(device, length, batch=2)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    for arguments in ({}, {"attention_mask": padded(ids, left=(30,))}):
        with hf.record() as recording:
            actual = logits_of(model, "proxyattn", ids, **arguments)
        reason = "short" if length < 128 else "not causal"
        assert recording.dense == {(0, reason): 1, (1, reason): 1}
        assert_same_bits(actual, logits_of(model, "sdpa", ids, **arguments))


def test_a_head_dim_without_kernels_is_dense(device, said):
    model, ids = tiny_model("Llama", device, head_dim=36), prompt(device)
    with hf.record() as recording:
        actual = logits_of(model, "proxyattn", ids)
    assert recording.dense == {(0, "no kernel"): 1, (1, "no kernel"): 1}
    assert_same_bits(actual, logits_of(model, "sdpa", ids))
    assert "head_dim 36 in torch." in said()[0] and f"on {device}" in said()[0]


def test_float32_on_a_gpu_is_dense(cuda):
    model, ids = tiny_model("Llama", cuda, torch.float32), prompt(cuda)
    with hf.record() as recording:
        logits_of(model, "proxyattn", ids)
    assert recording.dense == {(0, "no kernel"): 1, (1, "no kernel"): 1}


# ---- warnings


def test_each_model_warns_once_for_each_reason(said):
    ids = prompt("cpu")
    for expected in (1, 2):
        model = tiny_model("Llama", "cpu")
        for _ in range(2):
            model(ids)
        assert len(said()) == expected  # for both layers and both passes
    model.train()(ids)
    assert ["(gradient)" in line for line in said()] == [True, True, False]


def test_a_model_that_is_gone_is_forgotten(said):
    for expected in range(1, 6):  # of which some live where one before did
        tiny_model("Llama", "cpu")(prompt("cpu"))
        gc.collect()
        assert len(said()) == expected


# ---- one call


def _call(q_shape=(1, 2, 200, 64), kv_shape=None, attention_mask=None, module=None, **changes):
    """The hook's attention, recorded: why it ran dense, and its output beside SDPA's."""
    hf.register(**EXACT)
    module = torch.nn.Module().eval() if module is None else module
    q, k, v = (torch.randn(q_shape), *(torch.randn(kv_shape or q_shape) for _ in range(2)))
    for name, change in changes.pop("tensors", {}).items():
        q, k, v = (
            change(x) if name == which else x for which, x in zip("qkv", (q, k, v), strict=True)
        )
    with hf.record() as recording:
        attention = transformers.AttentionInterface()["proxyattn"]
        out, weights = attention(module, q, k, v, attention_mask, **changes)
    expected, _ = transformers.AttentionInterface()["sdpa"](
        module, q, k, v, attention_mask, **changes
    )
    assert weights is None
    reasons = [reason for _, reason in recording.dense]
    assert bool(reasons) != bool(recording.sparse)
    if reasons:
        assert_same_bits(out, expected)
    else:
        torch.testing.assert_close(out, expected)
    return reasons[0] if reasons else None


def _unlike_strides(x):
    """The last dimension is not contiguous."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


REASONS = {
    "nothing": ({}, None),
    "no bias": ({"position_bias": None}, None),
    "no weights": ({"output_attentions": False}, None),
    "nothing new": ({"indices": None, "something_new": None}, None),
    "no window": ({"sliding_window": None}, None),
    "a window of all": ({"sliding_window": 200}, None),
    "a window": ({"sliding_window": 199}, "sliding_window"),
    "a bias": ({"position_bias": torch.randn(1, 2, 200, 200)}, "position_bias"),
    "weights": ({"output_attentions": True}, "output_attentions"),
    "a mask": ({"attention_mask": torch.ones(1, 1, 200, 200, dtype=torch.bool)}, "mask"),
    "a float mask": ({"attention_mask": torch.zeros(1, 1, 200, 200)}, "mask"),
    "not causal": ({"is_causal": False}, "not causal"),
    "fewer queries than keys": ({"kv_shape": (1, 2, 300, 64)}, "cache"),
    "dropout": ({"dropout": 1.0}, "dropout"),
    "values of another size": ({"tensors": {"v": lambda v: v[..., :32]}}, "head_dim"),
    "queries that are transposed": ({"tensors": {"q": _unlike_strides}}, "layout"),
    "keys that are transposed": ({"tensors": {"k": _unlike_strides}}, "layout"),
    "values that are transposed": ({"tensors": {"v": _unlike_strides}}, "layout"),
    "gradients": ({"tensors": {"k": lambda k: k.requires_grad_()}}, "gradient"),
    "heads of 36": ({"q_shape": (1, 2, 200, 36)}, "no kernel"),
    "double precision": ({"tensors": dict.fromkeys("qkv", lambda x: x.double())}, "no kernel"),
    "one sequence": ({"cu_seq_lens_q": torch.tensor([0, 200]), "max_length_q": 200}, None),
    "few queries": ({"q_shape": (1, 2, 63, 64)}, "short"),
}


@pytest.mark.parametrize(("changes", "reason"), REASONS.values(), ids=REASONS)
def test_the_reason_of_a_call(changes, reason):
    assert _call(**changes) == reason


@torch.no_grad()
def test_gradients_that_are_switched_off_are_none():
    for name in "qkv":
        assert _call(tensors={name: lambda x: x.requires_grad_()}) is None


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_tensors_of_two_dtypes_go_to_sdpa(name):
    with pytest.raises(RuntimeError, match="dtype"):  # which refuses them
        _call(tensors={name: lambda x: x.bfloat16()})


@pytest.mark.parametrize("name", ["q", "k"])
def test_heads_of_two_sizes_go_to_sdpa(name):
    with pytest.raises(RuntimeError):  # which refuses them
        _call(tensors={name: lambda x: x[..., :32]})


# ---- refused


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"s_aux": torch.zeros(1)}, "one logit for each of the 2 query heads"),
        ({"sinks": torch.zeros(2)}, "the argument sinks"),
        ({"softcap": 30.0}, "capped scores"),
        ({"indices": torch.zeros(1, 200, 64)}, "the argument indices"),
        ({"block_indices": torch.zeros(1)}, "the argument block_indices"),
        ({"sinks": torch.zeros(2)}, "the argument sinks"),
        ({"something_new": False}, "the argument something_new"),
        ({"cu_seq_lens_q": torch.tensor([0, 50, 200])}, "packed sequences .* without a mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("length", [100, 200])
def test_arguments_that_would_be_dropped_are_refused(length, argument, message):
    with pytest.raises(ValueError, match=message):
        _call(q_shape=(1, 2, length, 64), **argument)


def test_a_mask_keeps_packed_sequences_apart():
    mask = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()
    mask[..., 50:, :50] = False
    boundaries = torch.tensor([0, 50, 200])
    assert _call(attention_mask=mask, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries) == "mask"


OWN_ATTENTION = ["BloomForCausalLM", "MptForCausalLM", "XGLMForCausalLM", "FalconForCausalLM"]
OWN_ATTENTION += ["GPTNeoForCausalLM", "MegatronBertForCausalLM"]


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_attention_of_their_own_are_named(name):
    with torch.device("meta"):
        cls = getattr(transformers, name)
        model = cls(cls.config_class(**({"num_layers": 24} if "Neo" in name else {})))
    with pytest.raises(ValueError, match=f"{name} has attention code of its own"):
        hf.check_model(model)


def test_models_without_sdpa_are_named():
    """GIT's text part has attention of its own, its image part has not."""
    with torch.device("meta"):
        model = transformers.GitForCausalLM(transformers.GitConfig())
    with pytest.raises(ValueError, match="GitForCausalLM supports neither SDPA"):
        hf.check_model(model)


def test_a_mask_for_such_a_model_is_refused():
    config = transformers.GitConfig(
        vocab_size=128, hidden_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.GitForCausalLM(config).eval()
    hf.register(**EXACT)
    model.set_attn_implementation("proxyattn")  # which transformers takes
    with pytest.raises(ValueError, match="supports neither SDPA"):
        model(prompt("cpu", 20))


def test_models_outside_transformers_may_look_attention_up_in_their_way(monkeypatch):
    module = ModuleType("modeling_outside")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class OutsideForCausalLM(transformers.PreTrainedModel):
        __module__ = module.__name__  # whose source can't be read
        config_class = transformers.LlamaConfig
        _supports_sdpa = True

    model = OutsideForCausalLM(transformers.LlamaConfig())
    with pytest.raises(ValueError, match="attention code of its own"):
        hf.check_model(model)
    module.ALL_ATTENTION_FUNCTIONS = transformers.AttentionInterface()
    hf.check_model(model)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GptOss", "Gemma3", "Bart"])
def test_other_models_pass(name):
    suffix = "ForConditionalGeneration" if name == "Bart" else "ForCausalLM"
    with torch.device("meta"):
        cls = getattr(transformers, name + suffix)
        config = cls.config_class()
        hf.check_model(cls(config.get_text_config() if name == "Gemma3" else config))
