"""Every family of hf_families.py with all blocks read: the numbers of SDPA, from the layers that
the table says. On a CPU, in float32: what differs between families is code, not arithmetic."""

import copy
from pathlib import Path

import pytest
import torch
from hf_families import FAMILIES, LENGTH, readme_table
from hf_tiny import chunked_logits, hf, new_cache, padded
from tolerance import assert_close, to_numpy

README = Path(__file__).parents[1] / "README.md"
RUN = [family for family in FAMILIES if family.refused is None]
REFUSED = [family for family in FAMILIES if family.refused is not None]


def _families(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


_FAMILIES_AND_CACHES = pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in RUN for kind in family.caches],
    ids=lambda value: value if isinstance(value, str) else value.name,
)


def _prompt():
    random = torch.Generator().manual_seed(2)
    return torch.randint(3, 126, (3, LENGTH), generator=random)


@pytest.fixture(autouse=True)
def _all_blocks(set_threads):
    set_threads(1)  # models as small as these only wait for more
    hf.register(gamma=1.0, min_seqlen=100)


def _check(family, model, logits_with, mask=None):
    """What `logits_with` returns from the hook, within twice SDPA's own error against float64."""
    with torch.no_grad():
        reference = logits_with(copy.deepcopy(model).double(), family.reference)
        plain = logits_with(model, family.reference)
        with hf.record() as recorded:
            actual = logits_with(model, "proxyattn")
    if mask is not None:
        actual, reference, plain = (x[mask.bool()] for x in (actual, reference, plain))
    assert_close(actual, to_numpy(reference), plain, "logits")
    return recorded


def _sparse_layers(recording):
    """Once each: DiffLlama's layers attend twice, and padded rows run one by one."""
    return tuple(sorted({call.layer for call in recording.sparse}))


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@_families(RUN)
def test_all_blocks_give_the_logits_of_sdpa(family, is_padded):
    model, ids = family.make(family.reference), _prompt()
    mask = padded(ids, left=[0, 30], right=[0, 0, 20]) if is_padded else None

    def logits_with(model, implementation):
        model.set_attn_implementation(implementation)
        return model(**family.inputs(ids, mask)).logits

    recording = _check(family, model, logits_with, mask)
    assert _sparse_layers(recording) == family.sparse
    assert {key: n for key, n in recording.dense.items() if key[0] is not None} == (
        family.dense_calls(is_padded)
    )


@_FAMILIES_AND_CACHES
def test_chunks_give_the_logits_of_sdpa(family, kind):
    model, ids = family.make(family.reference), _prompt()

    def logits_with(model, implementation):
        chunks = ids.split([110, LENGTH - 110], dim=1)
        cache = new_cache(kind, model, capacity=LENGTH + 20)
        return chunked_logits(model, implementation, chunks, cache)

    recording = _check(family, model, logits_with)
    assert _sparse_layers(recording) == family.sparse
    for layer in family.sparse:
        lengths = {(call.q_len, call.kv_len) for call in recording.sparse if call.layer == layer}
        assert lengths == {(110, 110), (LENGTH - 110, LENGTH)}


@_families([family for family in RUN if not family.reads_twice])
def test_beams_find_the_tokens_of_sdpa(family):
    model, ids = family.make(family.reference), _prompt()[:2]
    mask = padded(ids, left=[0, 30])
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    found = {}
    for implementation in (family.reference, "proxyattn"):
        model.set_attn_implementation(implementation)
        with hf.record() as recording:
            found[implementation] = model.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(found["proxyattn"], found[family.reference])
    assert _sparse_layers(recording) == (family.generating or family.sparse)


@pytest.mark.parametrize("is_padded", [False, True], ids=["whole", "padded"])
@_families([family for family in RUN if "window" in {reason for _, reason in family.dense}])
def test_windows_and_sinks_are_those_of_eager(family, is_padded):
    """Whose masks and sinks are the model's own code: within 1e-5 of the largest logit."""
    model, ids = family.make("eager"), _prompt()
    mask = padded(ids, left=[0, 30], right=[0, 0, 20]) if is_padded else None
    logits = {}
    with torch.no_grad():
        for implementation in ("eager", "proxyattn"):
            model.set_attn_implementation(implementation)
            logits[implementation] = model(**family.inputs(ids, mask)).logits
    got, want = logits["proxyattn"], logits["eager"]
    if is_padded:
        got, want = got[mask.bool()], want[mask.bool()]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * want.abs().max().item())


@_families(REFUSED)
def test_what_the_hook_cannot_run_is_refused(family):
    model = family.make("proxyattn")
    with pytest.raises(ValueError, match=family.refused):
        model(_prompt())


def test_readme_has_the_table():
    assert readme_table() in README.read_text(encoding="utf-8")
