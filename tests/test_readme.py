"""README.md: its code blocks run as they stand, and what it says of names and defaults is so."""

import inspect
import re
from pathlib import Path

import proxyattn
import pytest
import torch
from proxyattn import ops
from tiny_model import save_tiny_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")

TOKENS = 1024  # where the page says 8192


def python_blocks():
    """(line of the first statement, code) of every block of Python, in the order of the page."""
    found = re.finditer(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README[: block.start(1)].count("\n"), block[1]) for block in found]


def test_every_block_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """One after another, as a reader would paste them, with a model and a prompt of their own."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    randn = torch.randn

    def fewer_tokens(*sizes, **options):
        return randn(*(TOKENS if size == 8192 else size for size in sizes), **options)

    monkeypatch.setattr(torch, "randn", fewer_tokens)  # for the time it takes on two cores
    # As many new tokens as run sparse with the hook's own least length.
    names = {
        "path": save_tiny_model(tmp_path),
        "input_ids": torch.randint(0, 256, (1, 4096)),
    }
    # What torchrun says of a single process.
    torchrun = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    blocks = python_blocks()
    assert len(blocks) >= 5
    try:
        for line, code in blocks:
            # Blank lines before it, so that a traceback names the line of the page.
            exec(compile("\n" * line + code, str(ROOT / "README.md"), "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    assert names["out"].shape == names["q"].shape == (1, TOKENS, 32, 128)
    assert names["lse"].shape == (1, 32, TOKENS)
    recording = names["recording"]
    assert [call.layer for call in recording.sparse] == [0, 1] and not recording.dense
    printed = capsys.readouterr().out
    assert re.search(r"^1 0\.\d+ 4$", printed, re.MULTILINE)  # layer, share, proxy heads


def rows(heading):
    """First cells and rows of the table that begins with this heading."""
    table = README[README.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return {row.split("|")[1].strip(): row for row in table}


def test_the_table_of_settings_is_that_of_the_op():
    parameters = inspect.signature(proxyattn.proxy_attention).parameters
    for name, row in rows("| argument | default |").items():
        default = parameters[name.strip("`")].default
        if name == "`gamma`":
            wanted = "by mode, {top_p:g} or {last_block:g}".format(**ops.DEFAULT_GAMMA)
        elif name == "`min_budget`":
            wanted = "by mode, {top_p} or {last_block}".format(**ops.DEFAULT_MIN_BUDGET)
        elif default is None:
            wanted = f"all kv heads, or enough for {ops.MIN_PROXY_HEADS}"
        else:
            wanted = f'`"{default}"`' if isinstance(default, str) else str(default)
        assert row.split("|")[2].strip() == wanted, name


def test_every_op_is_in_the_table_of_ops():
    listed = {name.split("`")[1] for name in rows("| function | in | out |")}
    public = {name for name in proxyattn.__all__ if hasattr(torch.ops.proxyattn, name)}
    assert listed == public


def test_every_environment_variable_is_listed():
    sources = [*(ROOT / "python").rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp")]
    read = r'(?:getenv\(|environ(?:\.get\(|\[)|kFamilyVariable = )"(PROXYATTN_\w+)"'
    found = {name for path in sources for name in re.findall(read, path.read_text("utf-8"))}
    setup = (ROOT / "setup.py").read_text("utf-8")
    found |= set(re.findall(r'"(PROXYATTN_\w+)"', setup))
    assert len(found) >= 10
    assert sorted(name for name in found if f"`{name}" not in README) == []
