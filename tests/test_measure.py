"""The pieces that the main job measures with, and the made-up layer that it measures on."""

import math

import pytest
import torch
from proxyattn import Settings, choose_blocks
from proxyattn._demo import make_layer
from proxyattn._measure import chosen_blocks, exact_rows, kept_mass, sample_rows
from proxyattn._report import legend, table
from proxyattn._stages import observe, run_stages, visible_blocks


def test_exact_rows_by_hand():
    # Two keys per block; equal logits, so every visible key weighs the same.
    q, k = torch.zeros(2, 4), torch.zeros(5, 4)
    v = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]).expand(5, 4)
    chosen = torch.tensor([[True, False, True], [True, False, True]])
    exact = exact_rows(q, k, v, torch.tensor([3, 4]))
    wanted = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.4, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(exact.block_mass(2), wanted)
    torch.testing.assert_close(exact.kept(chosen, 2), torch.tensor([0.5, 0.6]).double())
    torch.testing.assert_close(exact.out[:, 0], torch.tensor([2.5, 3.0]).double())
    wanted = torch.tensor([1.5, 8 / 3], dtype=torch.float64)
    torch.testing.assert_close(exact.chosen_out(chosen, 2)[:, 0], wanted)


def test_chosen_blocks_by_hand():
    indices = torch.tensor([[[[0, -1, -1], [1, 0, -1]], [[0, -1, -1], [0, 1, -1]]]])
    counts = torch.tensor([[[1, 1], [1, 2], [1, 1], [0, 2]]])
    blocks = torch.tensor([1, 0])
    wanted = {0: [[0, 1, 0], [1, 0, 0]], 1: [[1, 1, 0], [1, 0, 0]]}
    wanted |= {2: [[1, 0, 0], [1, 0, 0]], 3: [[1, 1, 0], [0, 0, 0]]}
    for head, rows in wanted.items():
        assert chosen_blocks(indices.int(), counts.int(), head, blocks).int().tolist() == rows


def test_visible_blocks_by_hand():
    assert visible_blocks(300, 300, 128).tolist() == [1, 2, 3]
    assert visible_blocks(100, 300, 64).tolist() == [5, 5]
    assert visible_blocks(1, 129, 128).tolist() == [2]
    assert visible_blocks(0, 5, 64).tolist() == []


def test_sampled_rows_cover_the_prompt():
    rows = sample_rows(1000, 10, seed=0)
    assert (rows // 100).tolist() == list(range(10))
    assert sample_rows(3, 10, seed=0).tolist() == [0, 1, 2]


def stage_calls(q, k, v, settings, scale=None):
    calls = []
    with observe(calls.append):
        outputs = run_stages(q, k, v, settings, scale)
    run_stages(q, k, v, settings, scale)  # outside of the block, and so not seen
    assert len(calls) == 1 and calls[0].outputs is outputs
    return calls[0]


@pytest.mark.parametrize("prefix", [0, 100], ids=["prompt", "chunk"])
def test_kept_mass_is_that_of_exact_attention(device, prefix):
    length, scale = 700 + prefix, 0.3
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q = torch.randn(2, 700, 4, 64, dtype=dtype, device=device)
    k, v = (torch.randn(2, length, 2, 64, dtype=dtype, device=device) for _ in range(2))
    settings = Settings(gamma=0.5, min_budget=0, num_proxy_heads=2)
    call = stage_calls(q, k, v, settings, scale)
    kept = kept_mass(call, num_blocks=3)  # of 11: the first, the middle one and the last
    rows = torch.cat([torch.arange(0, 64), torch.arange(320, 384), torch.arange(640, 700)])
    indices, counts = call.outputs.indices, call.outputs.counts
    for batch in range(2):
        for head in range(4):
            logits = q[batch, rows, head].double() @ k[batch, :, head // 2].double().T * scale
            hidden = torch.arange(length) > prefix + rows[:, None]
            weights = logits.cpu().masked_fill(hidden, -math.inf).softmax(1)
            lists = indices[batch : batch + 1], counts[batch : batch + 1]
            chosen = chosen_blocks(*lists, head, rows.to(device) // 64).cpu()
            exact = (weights * chosen.repeat_interleave(64, 1)[:, :length]).sum(1).mean()
            assert 0 < exact < 0.99
            assert float(kept[batch, head]) == pytest.approx(float(exact), abs=1e-5)


def test_all_blocks_keep_everything():
    q, k, v = (torch.randn(1, 300, heads, 64) for heads in (2, 1, 1))
    call = stage_calls(q, k, v, Settings(gamma=1.0))
    assert kept_mass(call, num_blocks=5).tolist()[0] == pytest.approx([1.0, 1.0], abs=1e-6)


# ---- the made-up layer


def test_the_layer_is_what_it_says():
    layer = make_layer(4096, 8, 2, 64, torch.float32, "cpu", seed=1)
    again = make_layer(4096, 8, 2, 64, torch.float32, "cpu", seed=1)
    assert torch.equal(layer.q, again.q) and torch.equal(layer.v, again.v)
    assert layer.q.shape == (1, 4096, 8, 64) and layer.k.shape == layer.v.shape == (1, 4096, 2, 64)
    assert layer.questions.min() >= 3072 and layer.questions.max() < 4096


def blocks_read(length, **settings):
    """Shares of the visible blocks that the heads of the default layer of a CPU read."""
    layer = make_layer(length, 8, 2, 128, torch.float32, "cpu")
    _, counts = choose_blocks(layer.q, layer.k, **settings)
    visible = visible_blocks(length, length, settings.get("block_size", 64)).sum()
    return counts[0].sum(1) / visible


@pytest.mark.parametrize(("length", "spread"), [(4096, 1.5), (8192, 2.5)])
def test_heads_read_visibly_different_shares(length, spread):
    """With the defaults and their floors, where narrow heads rest."""
    shares = blocks_read(length)
    assert shares.max() > spread * shares.min()
    assert len(set((1000 * shares).round().tolist())) >= 6
    few, many = blocks_read(length, gamma=0.5), blocks_read(length, gamma=0.95)
    assert (many > 1.2 * few).all() and few.mean() < shares.mean() < many.mean()


def test_heads_read_visibly_different_shares_by_the_papers_setting():
    shares = blocks_read(8192, **Settings.paper().to_dict())
    assert shares.max() > 1.5 * shares.min() and len(set(shares.tolist())) >= 4


def test_a_table():
    assert table(("name", "ms"), [("a", "1.5"), ("long name", "10.25")]).splitlines() == [
        "name          ms",
        "---------  -----",
        "a            1.5",
        "long name  10.25",
    ]


def test_a_legend():
    assert legend({"ms": "time", "share": "of all"}) == "  ms     time\n  share  of all"
