"""The hook under torch.compile: one graph, the same numbers, and the same layers sparse."""

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
    new_cache,
    padded,
    prompt,
    sparse_layers,
    tiny_model,
    transformers,
)
from tolerance import assert_close, to_numpy


class Compiled:
    """A model in one graph, and the hook's ops in it."""

    def __init__(self, model, **options):
        torch._dynamo.reset()
        model.set_attn_implementation("proxyattn")
        self.ops = []

        def backend(graph, inputs):
            targets = [str(node.target) for node in graph.graph.nodes]
            self.ops += [target for target in targets if target.startswith("proxyattn")]
            return graph

        self.run = torch.compile(model, backend=backend, fullgraph=True, **options)

    @torch.no_grad()
    def __call__(self, ids, **arguments):
        return self.run(ids, **arguments).logits


def test_it_compiles_without_a_break(device):
    model, ids = tiny_model("Llama", device), prompt(device)
    compiled = Compiled(model)
    actual = compiled(ids)
    assert compiled.ops == ["proxyattn.proxy_attention"] * 2
    assert_like_sdpa(model, actual, ids)


CASES = {
    "an all-ones mask": ({"left": ()}, {}),
    "padding": ({"left": (30,), "right": (0, 20)}, {}),
    "no cache": (None, {"use_cache": False}),
    "a mask and no cache": ({"left": (30,)}, {"use_cache": False}),
}


@pytest.mark.parametrize(("padding", "arguments"), CASES.values(), ids=CASES)
def test_what_a_graph_cannot_look_into_is_sparse(padding, arguments, device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    if padding is not None:
        arguments = {**arguments, "attention_mask": padded(ids, **padding)}
    compiled = Compiled(model)
    with hf.record() as recording:
        recorded = compiled(ids, **arguments)
    assert set(sparse_layers(recording)) == {0, 1} and not recording.dense
    actual = compiled(ids, **arguments)
    assert compiled.ops[-2:] == ["proxyattn_hf.run.default"] * 2
    assert_like_sdpa(model, recorded, ids, **arguments)
    assert_like_sdpa(model, actual, ids, **arguments)


def test_a_padded_graph_serves_other_paddings(device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    compiled = Compiled(model)
    for left in ((), (30,), (0, 170)):
        mask = padded(ids, left=left)
        assert_like_sdpa(model, compiled(ids, attention_mask=mask), ids, attention_mask=mask)
    assert len(compiled.ops) == 2  # one graph


def test_packed_sequences_are_kept_apart(device):
    model, ids = tiny_model("Llama", device), prompt(device)
    arguments = {"position_ids": torch.arange(400, device=device)[None] % 150, "use_cache": False}
    compiled = Compiled(model)
    with hf.record() as recording:
        actual = compiled(ids, **arguments)
    lengths = [(call.q_len, call.kv_len) for call in recording.sparse if call.layer == 0]
    assert lengths == [(150, 150), (150, 150), (100, 100)]
    assert_like_sdpa(model, actual, ids, **arguments)


def test_blocks_that_see_each_other_are_dense(device):
    """What a packed causal mask must not be taken for: tokens of an image see later ones."""
    model, ids = tiny_model("Llama", device), prompt(device)
    config, embeddings = model.config, model.get_input_embeddings()(ids).detach()
    blocks = torch.full((1, 400), -1, device=device)
    blocks[:, 100:140] = 0
    positions = torch.arange(400, device=device)[None]

    def mask():
        return transformers.masking_utils.create_causal_mask(
            config, embeddings, None, None, position_ids=positions, block_sequence_ids=blocks
        )

    torch._dynamo.reset()
    compiled = torch.compile(mask, backend="eager", fullgraph=True)()
    assert compiled.dtype == torch.bool
    assert torch.equal(compiled, mask())
    assert compiled[0, 0, 100, 139] and not compiled[0, 0, 99, 100]


@pytest.mark.parametrize(
    ("kind", "is_padded", "dynamic"),
    [
        ("dynamic", False, False),
        ("dynamic", True, True),
        ("static", False, False),
        ("static", True, False),
    ],
)
def test_chunks_are_sparse(kind, is_padded, dynamic, device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    mask = padded(ids, left=(30,)) if is_padded else None
    chunks = ids.split([150, 250], dim=1)
    compiled = Compiled(model, dynamic=dynamic)
    with hf.record() as recording:
        actual = chunked_with(compiled, chunks, new_cache(kind, model), mask)
    assert set(sparse_layers(recording)) == {0, 1} and not recording.dense
    exact = copy.deepcopy(model).double()
    reference = chunked_logits(exact, "sdpa", chunks, new_cache(kind, exact), mask)
    plain = chunked_logits(model, "sdpa", chunks, new_cache(kind, model), mask)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert_close(actual[real], to_numpy(reference[real]), plain[real], "logits")


def chunked_with(compiled, chunks, cache, attention_mask):
    logits, seen = [], 0
    for chunk in chunks:
        seen += chunk.shape[1]
        mask = None if attention_mask is None else attention_mask[:, :seen]
        logits.append(compiled(chunk, attention_mask=mask, **{CACHE: cache}))
    return torch.cat(logits, dim=1)


def test_a_graph_follows_the_settings(device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    arguments = {"attention_mask": padded(ids, left=(30,))}
    compiled = Compiled(model)
    with hf.record() as recording:
        compiled(ids, **arguments)
        hf.register(**THIN)
        compiled(ids, **arguments)
    shares = [call.share for call in recording.sparse]
    assert max(shares[:4]) == 1.0 and max(shares[4:]) < 1.0


def test_dense_calls_are_recorded_and_explained(device, caplog):
    model, ids = tiny_model("Llama", device), prompt(device)
    compiled = Compiled(model)
    with hf.record() as recording:
        compiled.run(ids, labels=ids).loss.backward()
    assert recording.dense == {(0, "gradient"): 1, (1, "gradient"): 1}
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    (said,) = [record.message for record in caplog.records if record.name == "proxyattn"]
    assert "(gradient)" in said and "torch.no_grad()" in said


def test_short_prompts_are_dense(device):
    hf.register(**EXACT)
    model, ids = tiny_model("Llama", device), prompt(device, 120, batch=2)
    arguments = {"attention_mask": padded(ids, left=(30,))}
    compiled = Compiled(model)
    with hf.record() as recording:
        actual = compiled(ids, **arguments)
    assert recording.dense == {(0, "short"): 1, (1, "short"): 1} and not recording.sparse
    assert_like_sdpa(model, actual, ids, **arguments)


def test_the_whole_compiler_agrees(device):
    model, ids = tiny_model("Llama", device), prompt(device, batch=2)
    arguments = {"attention_mask": padded(ids, left=(30,))}
    torch._dynamo.reset()
    model.set_attn_implementation("proxyattn")
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True)(ids, **arguments).logits
    assert_like_sdpa(model, actual, ids, **arguments)
