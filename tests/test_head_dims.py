"""Head sizes that have no kernels of their own: any multiple of 8 on a CPU."""

import numpy as np
import proxyattn
import pytest
import torch
from arguments import message_of
from chain import random_inputs
from inputs import DTYPES
from lists import assert_same_lists
from packs import random_pack
from reference import pipeline
from test_attention_reference import Case, check
from tolerance import assert_same_bits, to_numpy

SIZES = (8, 24, 72, 96, 120, 192, 248)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", SIZES)
def test_attention(head_dim, dtype):
    layouts = ("padded", "unaligned", "heads_first")
    check(
        Case(2, (130, 191, True), (8, 2, 4), head_dim, 64, "ragged", None, 1.0, dtype, layouts),
        "cpu",
    )


@pytest.mark.parametrize("mode", ["top_p", "last_block"])
@pytest.mark.parametrize("head_dim", SIZES)
def test_choice(head_dim, mode):
    torch.manual_seed(head_dim)
    q, k, _ = random_inputs("cpu", 200, 521, dtype=torch.float32, head_dim=head_dim, batch=1)
    settings = {"gamma": 0.7, "num_proxy_heads": 2, "min_budget": 0, "budget_mode": mode}
    indices, counts = proxyattn.choose_blocks(q, k, **settings)
    want = pipeline.choose_blocks(
        to_numpy(q),
        to_numpy(k),
        **settings,
        round_to_dtype=lambda x: x.astype(np.float32).astype(np.float64),
    )
    assert_same_lists(indices, want["indices"])
    assert np.array_equal(counts.numpy(), want["counts"])


@pytest.mark.parametrize("page", [None, 16])
def test_packed(page):
    pack = random_pack("cpu", [(100, 100), (65, 400), (1, 257)], head_dim=96, page=page)
    settings = {"gamma": 0.6, "min_budget": 0}
    out = proxyattn.proxy_attention_varlen(**pack.arguments, **settings)
    for i in range(len(pack.lengths)):
        want = proxyattn.proxy_attention(*pack.sequences[i], **settings)
        assert_same_bits(out[pack.tokens(i)], want[0])


def test_models():
    """Phi-3's heads are of 96."""
    tiny = pytest.importorskip("hf_tiny")
    model, ids = tiny.tiny_model("Llama", "cpu", head_dim=96), tiny.prompt("cpu")
    with tiny.hf.record() as recording:
        actual = tiny.logits_of(model, "proxyattn", ids)
    assert tiny.sparse_layers(recording) == [0, 1]
    tiny.assert_like_sdpa(model, actual, ids)


@pytest.mark.parametrize("head_dim", [4, 36, 264])
def test_sizes_that_no_kernel_takes(device, head_dim):
    q = torch.zeros(1, 4, 2, head_dim, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError) as error:
        proxyattn.proxy_attention(q, q, q)
    assert message_of(error) == (
        f"proxy_attention: head_dim must be a multiple of 8 up to 256, got head_dim={head_dim}"
    )


def test_gpus_say_which_sizes_they_have(cuda):
    q = torch.zeros(1, 4, 2, 96, dtype=torch.bfloat16, device=cuda)
    for call, op in (
        (lambda: proxyattn.pool_heads(q, q), "pool_heads"),
        (lambda: proxyattn.estimate_shares(q, q), "estimate_shares"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert message_of(error) == (
            f"{op}: head_dim must be one of 64, 128, 256 on a GPU, got head_dim=96"
        )
    with pytest.raises(ValueError, match="head_dim and dtype must be those of a kernel"):
        proxyattn.proxy_attention(q, q, q, gamma=1.0)
