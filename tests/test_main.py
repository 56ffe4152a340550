"""``python -m proxyattn``: its reports and its pictures."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import number, part, run
from proxyattn._model import load
from tiny_model import save_tiny_model

CODE_MODEL = Path(__file__).parents[2] / "shared" / "models" / "code-llama-26m"
SMALL = ["--length", "2048", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]
THIN = ["--min-budget", "0", "--repeats", "1"]
LINE = r"^{} +([\d.]+) "


# ---- a layer


def test_the_report_of_one_layer(capsys, device):
    status, out, _ = run(capsys, *SMALL, "--repeats", "1", "--device", device)
    assert status == 0
    assert "made up from seed 0: 2048 tokens, 4 query heads, 2 kv heads, head_dim 64" in out
    assert 0.7 < number(out, r"^  default +top_p, gamma ([\d.]+), pooling mean, stride 4, ") < 1
    assert "num_proxy_heads 4, min_budget 512 tokens, 1 sink and 1 local block(s)" in out
    assert re.search("^  paper +last_block, gamma 0.95, pooling first, stride 4, block_size 128, "
                     "num_proxy_heads 1, min_budget 2048 tokens", out, re.MULTILINE)  # fmt: skip
    heads = part(out, "heads, default")
    for name in ("forced hold", "blocks read", "kept", "error", "needles", "by dense"):
        assert name in heads.splitlines()[1]
        assert re.search(f"^  {name}  ", heads, re.MULTILINE) or f"{name}: " in heads
    assert len(re.findall(r"^[0-3] +[\d.]+ % +[\d.]+ % +[\d.]+ % ", heads, re.MULTILINE)) == 4
    stages = part(out, "stages, default")
    for stage in ("pool_heads", "score_blocks", "estimate_shares", "select_blocks"):
        assert number(stages, LINE.format(stage)) > 0
    comparison = part(out, "comparison")
    read = {name: number(comparison, LINE.format(name) + "%") for name in ("default", "paper")}
    assert 0 < read["default"] < read["paper"] == 100  # all of 2048 tokens is within its floor
    assert 50 < number(comparison, r"^default +[\d.]+ % +([\d.]+) %") < 100
    # Rounding separates the kernel from exact attention over its blocks, choice from exact
    # attention over all.
    rounding = number(comparison, r"rounding: ([\d.e-]+),")
    assert rounding < (1e-5 if device == "cpu" else 1e-2)
    assert number(comparison, r"^default .* % +([\d.e-]+) +\d+ of") > rounding
    assert number(comparison, r"^default .* ([\d.]+)x$") > 0
    assert number(comparison, r"^torch dense, .* ([\d.]+)x$") <= 1


def test_all_blocks_are_exact(capsys):
    status, out, _ = run(capsys, *SMALL, "--device", "cpu", "--repeats", "1", "--gamma", "1")
    assert status == 0
    comparison = part(out, "comparison")
    figures = r"^as given +100.0 % +100.0 % +([\d.e-]+) +\d+ of 64 "
    assert number(comparison, figures) < 1e-5
    answered = number(comparison, r"^as given .* (\d+) of 64 ")
    assert answered == number(comparison, r"^torch dense, .* (\d+) of 64 ") > 32


def test_the_papers_preset(capsys):
    arguments = [*SMALL, "--device", "cpu", "--repeats", "1", "--preset", "paper"]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    budgets = re.findall(r"^[0-3] +(\d+) +100.0 % ", part(out, "heads, paper"), re.MULTILINE)
    assert len(budgets) == 4 and all(1 <= int(budget) <= 16 for budget in budgets)
    assert number(part(out, "stages, paper"), LINE.format("estimate_budgets")) > 0
    assert "\ndefault " in part(out, "comparison") and "\npaper " in part(out, "comparison")
    # Options go over the preset.
    _, out, _ = run(capsys, *arguments, "--block-size", "64", "--min-budget", "0")
    assert "as given  last_block, gamma 0.95, pooling first, stride 4, block_size 64, " in out
    assert "num_proxy_heads 1, min_budget 0 tokens" in part(out, "proxyattn ")
    assert all(f"\n{name} " in part(out, "comparison") for name in ("as given", "default", "paper"))


def head_table(capsys, *arguments):
    status, out, _ = run(capsys, *SMALL, *THIN, "--device", "cpu", *arguments)
    assert status == 0
    return re.search(r"^heads, .*?(?=\n\n)", out, re.MULTILINE | re.DOTALL)[0]


def test_the_same_seed_gives_the_same_heads(capsys):
    reports = [head_table(capsys, "--seed", seed) for seed in (3, 3, 4)]
    assert reports[0] == reports[1] != reports[2]


@pytest.mark.parametrize("mode", ["top_p", "last_block"])
def test_gamma_changes_what_is_read(capsys, mode):
    tables = {head_table(capsys, "--budget-mode", mode, "--gamma", gamma) for gamma in (0.5, 0.95)}
    assert len(tables) == 2


def test_a_picture_of_a_layer(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "layer.png"
    status, out, _ = run(capsys, *SMALL, *THIN, "--device", "cpu", "--plot", path)
    assert status == 0 and f"drawn to {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


# ---- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Options that name a tiny model and a text of 3000 tokens."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    text = folder / "text.txt"
    text.write_text("0123456789" * 300)
    return ["--model", folder, "--text", text, "--device", "cpu"]


def test_the_report_of_a_model(capsys, model, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "model.pdf"
    arguments = ["--length", "2100", "--min-seqlen", "1", "--plot", path]
    status, out, _ = run(capsys, *model, *arguments)
    assert status == 0
    assert f"LlamaForCausalLM of {model[1]}, float32" in out
    assert f"the first 2100 tokens of {model[3]}" in out
    assert "num_proxy_heads 4, min_budget 512 tokens" in out
    row = r"^[01] +([\d.]+) % +([\d.]+) % +([\d.]+) % +([\d.]+) % +([\d.]+) %$"
    layers = re.findall(row, part(out, "layers, default"), re.MULTILINE)
    assert len(layers) == 2
    for read, least, most, kept, least_kept in (map(float, layer) for layer in layers):
        assert 0 < least <= read <= most <= 100 and 0 < least_kept <= kept <= 100
    comparison = part(out, "comparison")
    losses = [number(comparison, LINE.format(name)) for name in ("default", "paper", "torch dense")]
    assert max(losses) - min(losses) < 0.1 and 5 < losses[2] < 7  # log(256) and a little
    assert number(comparison, r"^paper .* ([\d.]+)x$") > 0
    assert path.read_bytes().startswith(b"%PDF") and f"drawn to {path}" in out
    assert "min_seqlen" not in out and "within min_budget" not in out


def test_what_a_short_prompt_means_is_said(capsys, model):
    status, out, _ = run(capsys, *model, "--length", "1000")
    assert status == 0
    assert out.count("dense: short") == 2  # layers
    assert "no layer ran sparse" in out and "speed-up" not in out
    assert "shorter than min_seqlen, 4096 tokens here" in out
    assert "paper: the prompt is within min_budget, 2048 tokens, so that every head reads" in out
    assert "default: the prompt is within" not in out


def test_how_much_of_the_text_was_read_is_said(model, tmp_path):
    _, folder, _, text, *_ = model

    def prompt(folder, length):
        about = load(folder, text, length, torch.float32, torch.device("cpu")).about_prompt
        return about.removesuffix(f" of {text}")

    assert prompt(folder, 3000) == "all 3000 tokens"
    assert prompt(folder, 3001) == "all 3000 tokens, fewer than --length 3001,"
    assert prompt(folder, 2999) == "the first 2999 tokens"
    limited = save_tiny_model(tmp_path, max_position_embeddings=500)
    assert prompt(limited, 600) == "the first 500 tokens (the model's limit is 500)"


@pytest.mark.skipif(not CODE_MODEL.is_dir(), reason="the code model is not beside the checkout")
def test_a_trained_model_keeps_its_loss(capsys, device):
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = ["--text", torch.nn.functional.__file__, "--length", "3072", "--min-seqlen", "1"]
    options = ["--repeats", "1", "--device", device]
    status, out, _ = run(capsys, "--model", CODE_MODEL, *text, *options)
    assert status == 0
    comparison = part(out, "comparison")
    assert 0.5 < number(comparison, LINE.format("torch dense")) < 3
    loss, read = (
        number(comparison, r"^default +[\d.]+ +" + rest)
        for rest in (r"([-+][\d.]+) ", r"[-+][\d.]+ +([\d.]+) %")
    )
    assert abs(loss) < 0.01 and read < 60


def test_the_package_works_without_the_optional_ones():
    """Nothing but --model and --plot may need transformers or matplotlib."""
    names = [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name)]
    code = "import sys, proxyattn, proxyattn.__main__\n"
    code += f"print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
