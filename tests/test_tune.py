"""``python -m proxyattn tune``: what it tries, what it names, and what it writes."""

import json
import re
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from command import number, part, run
from proxyattn import Settings
from proxyattn._model import LayerReading, Reading
from proxyattn._tune import Sweep, Trial, TuneResult, _proxies
from tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Options that name a tiny model and a text, of which 1500 tokens are read."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 50)
    options = ["--model", folder, "--text", folder / "text.txt", "--length", "1500"]
    return [*options, "--device", "cpu", "--repeats", "1", "--min-budget", "0"]


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    """Many short forward passes, for which threads only wait for one another."""
    set_threads(1)


def test_the_cheapest_setting_is_named_and_written(capsys, model, tmp_path):
    from proxyattn import hf

    path = tmp_path / "settings.json"
    status, out, _ = run(capsys, "tune", *model, "--gammas", ".5", ".9", "--json", path)
    assert status == 0 and f"written to {path}" in out
    rows = re.findall(
        r"^(0.\d) +(\d) +([48]) +([\d.]+) % +([\d.]+) +([-+][\d.]+) +([\d.]+) % +([\d.]+) % "
        r"+([\d.]+) *(cheapest|over limit|)$",
        part(out, "gamma"),
        re.MULTILINE,
    )
    assert {row[:3] for row in rows} == set(product(("0.5", "0.9"), "248", "48"))
    reads = [float(row[3]) for row in rows]
    assert reads == sorted(reads) and reads[0] < 100
    for row in rows:
        _, least, median, _ = map(float, row[5:9])
        assert 0 < least <= median <= 100
    dense = number(part(out, "gamma"), r"^dense +100.0 % +([\d.]+) ")
    assert all(abs(float(row[4]) - float(row[5]) - dense) < 2e-4 for row in rows)
    (best,) = (row for row in rows if row[9] == "cheapest")
    assert float(best[5]) <= 0.005
    named = f"gamma={best[0]}, num_proxy_heads={best[1]}, stride={best[2]}"
    assert f"cheapest within 0.005 nats of dense attention: {named}" in out
    assert len(re.findall(r"^[01] +", part(out, f"layers, {named}"), re.MULTILINE)) == 2
    assert "shorter than min_seqlen, 4096 tokens" in out
    written = json.loads(path.read_text())
    wanted = {"gamma": float(best[0]), "num_proxy_heads": int(best[1]), "stride": int(best[2])}
    assert Settings.from_dict(written) == Settings(min_budget=0, **wanted)
    hf.register("proxyattn_test_tune", **written)


def test_a_limit_that_no_setting_keeps(capsys, model, tmp_path):
    path = tmp_path / "settings.json"
    one = ["--gammas", ".9", "--proxies", "2", "--strides", "8"]
    status, out, _ = run(capsys, "tune", *model, *one, "--max-loss", "-9", "--json", path)
    assert status == 1 and not path.exists()
    assert "no setting is within -9 nats of dense attention; the nearest is " in out
    assert len(re.findall("over limit$", out, re.MULTILINE)) == 1 and "cheapest" not in out


def test_the_papers_estimate_can_be_tuned_too(capsys, model):
    one = ["--gammas", ".9", "--proxies", "2", "--strides", "4", "--preset", "paper"]
    status, out, _ = run(capsys, "tune", *model, *one, "--max-loss", "9")
    assert status == 0
    assert "settings  last_block, " in out and "pooling first" in out and "block_size 128" in out


def test_a_model_that_can_not_run_sparse(capsys, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = save_tiny_model(tmp_path, head_dim=36)
    (folder / "text").write_text("some text")
    options = ["--device", "cpu", "--model", folder, "--text", folder / "text"]
    status, out, err = run(capsys, "tune", *options)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert "no layer of LlamaForCausalLM of" in err and "can run sparse: no kernel" in err


# ---- what is chosen, without a model


def reading(loss, ms, share=0.5, heads=(8, 2)):
    call = SimpleNamespace(
        blocks_visible=1000, blocks_read=1000 * share, counts=torch.zeros(1, heads[0], 1)
    )
    layer = LayerReading(call, torch.ones(heads[0]), heads[1])
    return Reading(loss, ms, [layer], {})


def best_of(*readings, max_loss=0.005):
    trials = [Trial(Settings(), one) for one in readings]
    dense = Reading(2.0, 100.0, [], {})
    best = TuneResult(None, Settings(), max_loss, dense, trials, 4096).best
    return None if best is None else trials.index(best)


def test_the_fastest_within_the_limit_is_the_best():
    assert best_of(reading(2.0, 50.0), reading(2.004, 40.0), reading(2.006, 10.0)) == 1
    assert best_of(reading(1.9, 50.0), reading(2.0, 60.0)) == 0
    assert best_of(reading(2.006, 10.0)) is None
    assert best_of(reading(2.006, 10.0), max_loss=0.01) == 0
    # A difference within the clock's noise is none: what reads least is the better one.
    assert best_of(reading(2.0, 50.0, share=0.4), reading(2.0, 50.5, share=0.3)) == 1
    assert best_of(reading(2.0, 50.0, share=0.4), reading(2.0, 52.0, share=0.3)) == 0


@pytest.mark.parametrize(
    ("heads", "proxies"),
    [
        ((32, 8), [4, 8, 16]),
        ((8, 2), [2, 4, 8]),
        ((28, 4), [2, 4, 28]),
        ((12, 1), [3, 4, 6]),
        ((1, 1), [1]),
        ((3, 3), [1, 3]),
    ],
)
def test_proxies_that_fit_a_model(heads, proxies):
    assert _proxies(reading(2.0, 1.0, heads=heads)) == proxies


def test_proxies_that_fit_all_layers():
    layers = [reading(2.0, 1.0, heads=heads).layers[0] for heads in ((8, 4), (8, 2))]
    assert _proxies(Reading(2.0, 1.0, layers, {})) == [2, 4, 8]


def test_a_sweep_tries_all_with_all():
    base = Settings(pooling="first")
    settings = Sweep([0.8, 0.9], [4], [1, 2]).settings(base)
    assert len(set(settings)) == 4 and all(one.pooling == "first" for one in settings)
    assert {(one.gamma, one.stride, one.num_proxy_heads) for one in settings} == {
        (gamma, 4, proxies) for gamma in (0.8, 0.9) for proxies in (1, 2)
    }
