"""``proxyattn.Settings``: what it holds, what is left open, and what it refuses."""

import inspect
import json

import proxyattn
import pytest
import torch
from proxyattn import Settings
from proxyattn._stages import Settings as SettingsOfStages
from proxyattn._stages import run_stages
from tolerance import order_error


def test_defaults_are_those_of_the_op():
    parameters = inspect.signature(proxyattn.proxy_attention).parameters
    settings = Settings().to_dict()
    assert settings == {name: parameters[name].default for name in settings}
    # What is not a setting says what to compute or with how much memory.
    others = {"q", "k", "v", "causal", "scale", "shares", "return_lse", "max_workspace_bytes"}
    others |= {"window", "sink_logits"}
    assert set(parameters) - set(settings) == others
    assert SettingsOfStages is Settings


def test_a_dictionary_and_back():
    settings = Settings(gamma=0.8, num_proxy_heads=4, pooling="first", min_budget=0)
    assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    assert Settings.from_dict({}) == Settings()
    assert Settings.from_dict({"gamma": 1, "stride": 8}) == Settings(gamma=1, stride=8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gama": 0.9}, "Settings: names must be among gamma, stride, .*, got 'gama'"),
        ({"gamma": "0.9"}, "Settings: gamma must be a number or None, got '0.9'"),
        ({"stride": 4.0}, "Settings: stride must be an integer, got 4.0"),
        ({"stride": None}, "Settings: stride must be an integer, got None"),
        ({"num_proxy_heads": True}, "num_proxy_heads must be an integer or None, got True"),
        ({"pooling": 1}, "Settings: pooling must be text, got 1"),
        ({"gamma": float("nan")}, "gamma must be a number"),
        ({"stride": 3}, "stride must be one of 1, 2, 4, 8, got stride=3"),
        ({"pooling": "max"}, "pooling must be .*mean"),
        ({"block_size": 32}, "block_size must be one of 64, 128, got block_size=32"),
        ({"num_proxy_heads": 0}, "num_proxy_heads"),
        ({"budget_mode": "coverage"}, "budget_mode must be .*top_p"),
        ({"min_budget": -1}, "min_budget must be at least 0, got min_budget=-1"),
        ({"num_sink_blocks": -1}, "num_sink_blocks must be at least 0"),
        ({"num_local_blocks": -1}, "num_local_blocks must be at least 0"),
    ],
)
def test_what_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_dict(values)


def test_what_is_left_open_by_mode_and_heads():
    top_p = Settings().resolve(32, 8)
    assert (top_p.min_budget, top_p.num_proxy_heads) == (512, 8)
    last_block = Settings(budget_mode="last_block").resolve(8, 2)
    assert (last_block.gamma, last_block.min_budget, last_block.num_proxy_heads) == (0.95, 2048, 4)
    given = Settings(gamma=0.5, min_budget=0, num_proxy_heads=2)
    assert given.resolve(8, 2) == given
    assert Settings().resolved_min_budget == 512 and given.resolved_min_budget == 0


@pytest.mark.parametrize("mode", ["top_p", "last_block"])
def test_resolved_settings_choose_the_same_blocks(mode):
    q, k, v = (torch.randn(1, 2048, heads, 64) for heads in (8, 2, 2))
    settings = Settings(budget_mode=mode)
    resolved = settings.resolve(8, 2)
    assert None not in resolved.to_dict().values()
    assert torch.equal(settings.attend(q, k, v), resolved.attend(q, k, v))


@pytest.mark.parametrize("settings", [Settings(), Settings.paper()], ids=["default", "paper"])
def test_the_stages_give_what_the_op_gives(device, settings):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k, v = (torch.randn(1, 3000, heads, 64, dtype=dtype, device=device) for heads in (8, 2, 2))
    outputs = run_stages(q, k, v, settings, scale=0.2)
    out = settings.attend(q, k, v, scale=0.2)
    torch.testing.assert_close(outputs.out, out, atol=order_error(out), rtol=0)
    chosen = proxyattn.choose_blocks(q, k, scale=0.2, **settings.to_dict())
    assert torch.equal(outputs.counts, chosen[1])


def test_the_papers_setting():
    assert Settings.paper().to_dict() == {
        "gamma": 0.95,
        "stride": 4,
        "pooling": "first",
        "block_size": 128,
        "num_proxy_heads": 1,
        "budget_mode": "last_block",
        "min_budget": 2048,
        "num_sink_blocks": 1,
        "num_local_blocks": 1,
    }
    assert Settings.paper(num_proxy_heads=4).num_proxy_heads == 4
    for heads in ((32, 8), (8, 1), (6, 3)):  # of every model
        q, k = (torch.empty(1, 0, count, 64) for count in heads)
        Settings.paper().attend(q, k, k)


def test_the_paper_reads_no_less_than_its_floor():
    q, k, v = (torch.randn(1, 4096, heads, 64) for heads in (4, 2, 2))
    counts = run_stages(q, k, v, Settings.paper()).counts
    visible = torch.arange(1, 33)
    assert (counts >= visible.clamp(max=2048 // 128)).all()
    # The same number in every query block that sees as many.
    assert (counts[..., -1:] >= counts).all()
    assert (counts == counts[..., -1:].clamp(max=visible)).all()
