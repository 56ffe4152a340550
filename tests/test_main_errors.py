"""``python -m proxyattn``: one sentence for everything that can go wrong, and what help says."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from command import run
from proxyattn import __main__ as command
from tiny_model import save_tiny_model


def check_sentence(outcome, message, code=2):
    status, out, err = outcome
    assert status == code and out == ""
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--length 5", "argument --length: must be at least 1024, got 5"),
        ("--length 0", "argument --length: must be at least 1024, got 0"),
        ("--length x", "argument --length: invalid int value: 'x'"),
        ("--length 1000000000", "out of memory on cpu; try a shorter --length"),
        ("--length 99999999999999999999", "out of memory on cpu; try a shorter --length"),
        ("--heads 7", "kv_heads must divide q_heads, got q_heads=7, kv_heads=2"),
        ("--kv-heads 0", "argument --kv-heads: must be at least 1, got 0"),
        ("--head-dim 84", "head_dim must be a multiple of 8 up to 256, got head_dim=84"),
        ("--head-dim -1", "argument --head-dim: must be at least 1, got -1"),
        ("--proxy-heads 3", "num_proxy_heads must divide kv_heads"),
        ("--gamma nan", "gamma must be a number, got gamma=nan"),
        ("--stride 3", "stride must be one of 1, 2, 4, 8, got stride=3"),
        ("--block-size 32", "block_size must be one of 64, 128, got block_size=32"),
        ("--min-budget -1", "min_budget must be at least 0, got min_budget=-1"),
        ("--budget-mode coverage", "argument --budget-mode: invalid choice: 'coverage'"),
        ("--pooling max", "argument --pooling: invalid choice: 'max'"),
        ("--preset best", "argument --preset: invalid choice: 'best'"),
        ("--repeats 0", "argument --repeats: must be at least 1, got 0"),
        ("--device abacus", "argument --device: must be cuda, cuda:N or cpu, got abacus"),
        ("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("--model .", "argument --model: needs --text FILE, the text to read"),
        ("--text x", "argument --text: needs --model DIR, the model that reads"),
        ("--min-seqlen 9", "argument --min-seqlen: needs --model DIR, the model that reads"),
        ("--model . --text x --length -5", "argument --length: must be at least 2, got -5"),
        ("--model . --text x --length 0", "argument --length: must be at least 2, got 0"),
        ("--model . --text x --min-seqlen 0", "argument --min-seqlen: must be at least 1, got 0"),
        ("--model . --text x --repeats 0", "argument --repeats: must be at least 1, got 0"),
        ("tune", "the following arguments are required: --model, --text"),
        ("tune --model . --text x --length 1", "argument --length: must be at least 2, got 1"),
        ("tune --model . --text x --strides 4 5", "stride must be one of 1, 2, 4, 8, got stride=5"),
        ("tune --model . --text x --proxies 0", "num_proxy_heads"),
        ("tune --model . --text x --max-loss x", "argument --max-loss: invalid float value: 'x'"),
        (
            "tune --model . --text x --json /no/dir/x.json",
            "/no/dir/x.json can't be written: there is no",
        ),
    ],
)
def test_a_wrong_argument_is_one_sentence(capsys, arguments, message):
    arguments = arguments.split()
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    check_sentence(run(capsys, *arguments), message)


@pytest.mark.parametrize("job", [[], ["tune"]], ids=["run", "tune"])
def test_files_that_are_not_there(capsys, tmp_path, job):
    pytest.importorskip("transformers", reason="transformers is not installed")
    options = [*job, "--device", "cpu", "--model", tmp_path, "--text", tmp_path / "text"]
    wanted = f"--model must be a folder that holds config.json, got {tmp_path}"
    check_sentence(run(capsys, *options), wanted)
    (tmp_path / "config.json").write_text("{}")
    check_sentence(run(capsys, *options), "--text can't be read: [Errno 2]")
    (tmp_path / "text").write_text("x = 1")
    check_sentence(run(capsys, *options), f"--model {tmp_path} can't be loaded")


def test_the_text_is_looked_at_before_the_weights(capsys, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    save_tiny_model(tmp_path)
    (tmp_path / "text").write_text("x")
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    options = ["--device", "cpu", "--model", tmp_path, "--text", tmp_path / "text"]
    check_sentence(run(capsys, *options), "--text must hold at least 2 tokens, got 1 in")
    (tmp_path / "text").write_text("x = 1")
    check_sentence(run(capsys, *options), f"--model {tmp_path} can't be loaded")


def model_that_fails(monkeypatch, folder, error):
    """Options of a tiny model whose every forward pass raises the error."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_tiny_model(folder)
    (folder / "text").write_text("some text")

    def forward(*_, **__):
        raise error

    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    return ["--device", "cpu", "--model", folder, "--text", folder / "text"]


def test_a_model_that_refuses(capsys, monkeypatch, tmp_path):
    error = ValueError("proxyattn: attention with learned sinks is not supported\nmore")
    options = model_that_fails(monkeypatch, tmp_path, error)
    wanted = "can't read the prompt: proxyattn: attention with learned sinks is not supported\n"
    check_sentence(run(capsys, *options), wanted)
    check_sentence(run(capsys, "tune", *options), wanted)


def test_a_fault_of_ours_keeps_its_traceback(capsys, monkeypatch, tmp_path):
    options = model_that_fails(monkeypatch, tmp_path, AttributeError("a slip"))
    with pytest.raises(AttributeError, match="a slip"):
        run(capsys, *options)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't "
                     "allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["gpu", "python", "cpu"],
)  # fmt: skip
def test_out_of_memory(capsys, monkeypatch, tmp_path, error):
    options = model_that_fails(monkeypatch, tmp_path, error)
    wanted = "out of memory on cpu; try a shorter --length"
    check_sentence(run(capsys, *options), wanted)

    def fail(*_):
        raise error

    monkeypatch.setattr(command, "run_layer", fail)
    check_sentence(run(capsys, "--device", "cpu"), wanted)


def test_torchs_allocator_says_what_we_listen_for():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert command.is_out_of_memory(caught.value)
    assert not command.is_out_of_memory(RuntimeError("some other fault"))


def test_a_model_with_attention_code_of_its_own(capsys, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    save_tiny_model(tmp_path)
    (tmp_path / "text").write_text("some text")
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    monkeypatch.setattr(attention, "forward", lambda _, hidden_states, **__: (hidden_states, None))
    options = ["--device", "cpu", "--model", tmp_path, "--text", tmp_path / "text"]
    check_sentence(run(capsys, *options), "has attention code of its own, which never asks for")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none/layer.png", "there is no folder"),
        ("layer.foo", "--plot must end in one of"),
        ("layer", "--plot must end in one of"),
        ("folder.png", "can't be written: it is a folder"),
    ],
)
def test_a_plot_that_can_not_be_written_is_refused_before_the_work(
    capsys, monkeypatch, tmp_path, name, message
):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    for job in ("run_layer", "run_model"):
        monkeypatch.setattr(command, job, lambda *_: pytest.fail("the work was done first"))
    (tmp_path / "folder.png").mkdir()
    options = ["--device", "cpu", "--plot", tmp_path / name]
    check_sentence(run(capsys, *options), message)
    check_sentence(run(capsys, *options, "--model", ".", "--text", "x"), message)


def test_a_plot_without_matplotlib(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    wanted = "--plot needs matplotlib; install it with: pip install matplotlib"
    check_sentence(run(capsys, "--device", "cpu", "--plot", "layer.png"), wanted)


def test_a_model_without_transformers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ["--device", "cpu", "--model", ".", "--text", "x"]
    check_sentence(run(capsys, *options), "--model needs transformers; install it with")


def test_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_sentence(run(capsys, "--device", "cuda"), "got cuda, but torch finds no GPU")


# ---- Ctrl-C


def test_ctrl_c_ends_in_one_line(capsys):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    arguments = ["--device", "cpu", "--length", "2048", "--repeats", "100000"]
    check_sentence(run(capsys, *arguments), "python -m proxyattn: interrupted\n", code=130)


def test_the_command_starts_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "proxyattn", "--length", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "must be at least 1024" in done.stderr
    assert "Traceback" not in done.stderr


# ---- help


@pytest.mark.parametrize("job", ["", "tune"], ids=["run", "tune"])
def test_help_shows_every_default(capsys, job):
    status, out, _ = run(capsys, *job.split(), "--help")
    assert status == 0
    parser = command.tune_parser() if job else command.main_parser()
    no_default = {"--help", "--model", "--text", "--plot"}
    for action in parser._actions:
        name = action.option_strings[-1]
        assert action.help, f"{name} says nothing"
        assert ("default" in action.help) != (name in no_default), name
        assert "%(" not in out and name in out
    assert "0.95 for last_block" in " ".join(out.split()) or job
    assert "512 for top_p, 2048 for last_block" in " ".join(out.split())
    for word in ("attention to keep", "Llama", "coverage"):
        assert word not in out
