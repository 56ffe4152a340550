"""``python -m proxyattn``: its measurements, its report and its one-sentence errors."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from proxyattn import __main__ as command
from proxyattn._demo import make_layer
from proxyattn._measure import chosen_blocks, exact_rows, sample_rows
from proxyattn._report import table
from proxyattn._stages import STAGES, Settings, run_stages, visible_blocks

CODE_MODEL = Path(__file__).parents[2] / "shared" / "models" / "code-llama-26m"
SMALL = ["--length", "2048", "--heads", "4", "--kv-heads", "2", "--head-dim", "64"]
THIN = ["--min-budget", "0", "--block-size", "64", "--repeats", "1"]


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of the command."""
    capsys.readouterr()
    try:
        status = command.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def number(text, pattern):
    found = re.search(pattern, text, re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[1])


# ---- the report


def test_the_report_of_one_layer(capsys, device):
    status, out, _ = run(capsys, *SMALL, *THIN, "--device", device)
    assert status == 0
    assert "2048 tokens, 4 query heads, 2 kv heads, head_dim 64" in out
    assert "gamma 0.95, last_block, stride 4, block_size 64, 2 proxy heads, min_budget 0" in out
    for stage in STAGES:
        assert number(out, rf"^{stage} +([\d.]+) ") > 0
    assert len(re.findall(r"^[0-3] +\d+ +[\d.]+ % +[\d.]+ % ", out, re.MULTILINE)) == 4
    assert 0 < number(out, r"blocks read +([\d.]+) %") < 100
    assert 50 < number(out, r"mass kept +([\d.]+) %") <= 100
    # Rounding separates the kernel from exact attention over its blocks, choice from exact
    # attention over all.
    rounding = number(out, r"its own blocks ([\d.e-]+)\)")
    assert rounding < (1e-5 if device == "cpu" else 1e-2)
    assert number(out, r"error +([\d.]+) relative") > rounding
    assert number(out, r"speed-up +([\d.]+)x") > 0


def test_all_blocks_are_exact(capsys):
    status, out, _ = run(capsys, *SMALL, "--device", "cpu", "--repeats", "1", "--gamma", "1")
    assert status == 0
    assert number(out, r"blocks read +([\d.]+) %") == 100
    assert number(out, r"mass kept +([\d.]+) %") == 100
    assert number(out, r"error +([\d.]+) relative") == 0
    answered = number(out, r"needles +(\d+) answered")
    assert answered == number(out, r"sparse attention, (\d+) by exact") > 0


def test_the_same_seed_gives_the_same_report(capsys):
    def report(seed):
        arguments = [*SMALL, *THIN, "--device", "cpu", "--seed", seed, "--budget-mode", "coverage"]
        _, out, _ = run(capsys, *arguments)
        return out[: out.index("time ")]

    assert report("3") == report("3") != report("4")


def test_a_picture(capsys, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "layer.png"
    status, out, _ = run(capsys, *SMALL, *THIN, "--device", "cpu", "--plot", str(path))
    assert status == 0 and f"drawn to {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_a_picture_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run(capsys, *SMALL, "--device", "cpu", "--plot", "layer.png")
    assert status == 2 and out == ""
    assert err.endswith("--plot needs matplotlib; install it with: pip install matplotlib\n")


@pytest.mark.skipif(not CODE_MODEL.is_dir(), reason="the code model is not beside the checkout")
def test_the_report_of_a_model(capsys, device):
    pytest.importorskip("transformers", reason="transformers is not installed")
    text = ["--text", torch.nn.functional.__file__, "--length", "1536"]
    status, out, _ = run(
        capsys, "--model", str(CODE_MODEL), *text, *THIN, "--gamma", "0.9", "--device", device
    )
    assert status == 0 and "1536 tokens" in out
    shares = re.findall(r"^[0-7] +([\d.]+) % +([\d.]+) % +([\d.]+) %$", out, re.MULTILINE)
    assert len(shares) == 8
    assert all(0 < float(low) <= float(mean) <= float(high) for mean, low, high in shares)
    dense, sparse = (number(out, rf"^{name} +([\d.]+) ") for name in ("dense", "sparse"))
    assert 0.5 < dense < 3 and abs(sparse - dense) < 0.5
    assert number(out, r"speed-up +([\d.]+)x of the prefill") > 0


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "5"], "argument --length: must be at least 1024, got 5"),
        (["--length", "x"], "argument --length: invalid int value: 'x'"),
        (["--heads", "7"], "kv_heads must divide q_heads, got q_heads=7, kv_heads=2"),
        (["--kv-heads", "0"], "argument --kv-heads: must be at least 1, got 0"),
        (["--head-dim", "80"], "head_dim must be one of 64, 128, 256, got head_dim=80"),
        (["--head-dim", "-1"], "argument --head-dim: must be at least 1, got -1"),
        (["--proxy-heads", "3"], "num_proxy_heads must divide kv_heads"),
        (["--gamma", "nan"], "gamma must be a number, got gamma=nan"),
        (["--stride", "3"], "stride must be one of 1, 2, 4, 8, got stride=3"),
        (["--block-size", "32"], "block_size must be one of 64, 128, got block_size=32"),
        (["--min-budget", "-1"], "min_budget must be at least 0, got min_budget=-1"),
        (["--repeats", "0"], "argument --repeats: must be at least 1, got 0"),
        (["--device", "abacus"], "argument --device: must be cuda, cuda:N or cpu, got abacus"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--model", "."], "argument --model: needs --text FILE, the text to read"),
        (["--text", "x"], "argument --text: needs --model DIR, the model that reads it"),
    ],
)
def test_a_wrong_argument_is_one_sentence(capsys, arguments, message):
    if "--device" not in arguments:
        arguments = ["--device", "cpu", *arguments]
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == ""
    assert message in err and err.count("\n") == 1


def test_files_that_are_not_there(capsys, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = ["--device", "cpu", "--model", str(tmp_path), "--text", str(tmp_path / "text")]
    status, _, err = run(capsys, *model)
    assert status == 2
    assert f"--model must be a folder that holds config.json, got {tmp_path}" in err
    (tmp_path / "config.json").write_text("{}")
    _, _, err = run(capsys, *model)
    assert "--text can't be read: [Errno 2]" in err and err.count("\n") == 1
    (tmp_path / "text").write_text("x = 1")
    _, _, err = run(capsys, *model)
    assert f"--model {tmp_path} can't be loaded" in err and err.count("\n") == 1


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = run(capsys, "--device", "cuda")
    assert status == 2 and "got cuda, but torch finds no GPU" in err


def test_the_command_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "proxyattn", "--length", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "must be at least 1024" in done.stderr
    assert "Traceback" not in done.stderr


# ---- the pieces it measures with


def test_exact_rows_by_hand():
    # Two keys per block; equal logits, so every visible key weighs the same.
    q, k = torch.zeros(2, 4), torch.zeros(5, 4)
    v = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]).expand(5, 4)
    chosen = torch.tensor([[True, False, True], [True, False, True]])
    exact = exact_rows(q, k, v, torch.tensor([3, 4]), chosen, 2)
    wanted = torch.tensor([[0.5, 0.5, 0.0], [0.4, 0.4, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(exact.block_mass, wanted)
    torch.testing.assert_close(exact.kept, torch.tensor([0.5, 0.6], dtype=torch.float64))
    torch.testing.assert_close(exact.out[:, 0], torch.tensor([2.5, 3.0], dtype=torch.float64))
    wanted = torch.tensor([1.5, 8 / 3], dtype=torch.float64)
    torch.testing.assert_close(exact.chosen_out[:, 0], wanted)


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


def test_the_layer_is_what_it_says():
    layer = make_layer(4096, 8, 2, 64, torch.float32, "cpu", seed=1)
    again = make_layer(4096, 8, 2, 64, torch.float32, "cpu", seed=1)
    assert torch.equal(layer.q, again.q) and torch.equal(layer.v, again.v)
    assert layer.q.shape == (1, 4096, 8, 64) and layer.k.shape == layer.v.shape == (1, 4096, 2, 64)
    assert layer.questions.min() >= 3072 and layer.questions.max() < 4096
    settings = Settings(block_size=64, min_budget=0, num_proxy_heads=1)
    budgets = run_stages(layer.q, layer.k, layer.v, settings).budgets
    assert len(set(budgets[0].tolist())) > 2  # heads differ in how much they need


def test_a_table():
    assert table(("name", "ms"), [("a", "1.5"), ("long name", "10.25")]).splitlines() == [
        "name          ms",
        "---------  -----",
        "a            1.5",
        "long name  10.25",
    ]


def test_the_package_works_without_the_optional_ones():
    """Nothing but --model and --plot may need transformers or matplotlib."""
    names = [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name)]
    code = "import sys, proxyattn, proxyattn.__main__\n"
    code += f"print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
