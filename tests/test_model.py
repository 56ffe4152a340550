"""What the command makes of models: their loss, whatever they do to logits, and kept attention."""

import pytest
import torch
from proxyattn import Settings
from proxyattn._model import LOSS_CHUNK, Reader

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
# Heads of their own: scaled, capped, or beside the logits of a router.
FAMILIES = {
    "llama": {},
    "granite": {"logits_scaling": 0.05},
    "cohere": {"logit_scale": 20.0},
    "gemma3_text": {"final_logit_softcapping": 0.1},
    "mixtral": {"num_local_experts": 2, "output_router_logits": False},
}


def reader(family, length, **changes):
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family] | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    return Reader(model, torch.randint(0, 100, (1, length)), "the model", "the prompt")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_models_own(family):
    model = reader(family, LOSS_CHUNK + 100)
    with torch.no_grad():
        logits = model.model(model.ids).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[:-1].float(), model.ids[0, 1:])
    plain = torch.nn.functional.cross_entropy(
        model.model.get_output_embeddings()(model.model.base_model(model.ids)[0][0, :-1]),
        model.ids[0, 1:],
    )
    assert (abs(plain - wanted) > 1e-3) == (family not in ("llama", "mixtral"))
    assert model.dense(repeats=1).loss == pytest.approx(float(wanted), abs=1e-5)
    # And the model is as it was.
    with torch.no_grad():
        assert torch.equal(model.model(model.ids).logits[0], logits)


def test_a_sparse_reading():
    from proxyattn import hf

    model = reader("llama", 1000, num_key_value_heads=1)
    hf.register("proxyattn_test_model", min_seqlen=1, gamma=0.5, min_budget=0)
    reading = model.sparse("proxyattn_test_model", repeats=1)
    assert reading.milliseconds > 0 and not reading.dense
    assert [layer.call.layer for layer in reading.layers] == [0, 1]
    assert all(layer.kept.shape == (4,) and layer.kv_heads == 1 for layer in reading.layers)
    assert all(0 < float(layer.kept.min()) < 1 for layer in reading.layers)
    assert 0 < reading.share < 1
    assert model.heads == (4, 1)
    hf.register("proxyattn_test_model", min_seqlen=1, **Settings(gamma=1.0).to_dict())
    whole = model.sparse("proxyattn_test_model", repeats=1)
    assert whole.share == 1 and whole.loss == pytest.approx(model.dense(1).loss, abs=1e-5)
    assert all(float(layer.kept.min()) == pytest.approx(1, abs=1e-5) for layer in whole.layers)
