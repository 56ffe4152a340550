"""The benchmarks run, say what they measured, and their comparisons judge rightly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
STAGES = ["attention", "needs", "pipeline", "pool", "score", "select"]

#: Small enough for a test: one length that is no multiple of a block, few heads.
TINY = {
    "attention": ["--length=200", "--lists=all,random:0.5,nested:0.5", "--head_dim=64"],
    "needs": ["--length=200", "--head_dim=64"],
    "pipeline": ["--length=200", "--head_dim=64", "--density=0.5", "--pooling=mean,first"],
    "pool": ["--length=200"],
    "score": ["--length=200", "--head_dim=64"],
    "select": ["--length=1000"],
}


def find_binary(name: str) -> Path:
    """From PROXYATTN_BENCH_DIR, else the newest below build/; skips where there is none."""
    folder = os.environ.get("PROXYATTN_BENCH_DIR")
    found = [Path(folder) / name] if folder else list(ROOT.glob(f"build/**/{name}"))
    found = [path for path in found if path.is_file() and os.access(path, os.X_OK)]
    if not found:
        where = folder or "build/ (set PROXYATTN_BENCH_DIR)"
        pytest.skip(f"{name} is not built in {where}; configure with -DPROXYATTN_BENCH=ON")
    return max(found, key=lambda path: path.stat().st_mtime)


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- the C++ benchmarks


@pytest.mark.parametrize("stage", STAGES)
def test_stage_runs_and_reports(stage, device):
    binary = find_binary(f"bench_{stage}")
    axes = run([binary, "--help"]).stdout
    heads = ("--q_heads=4", "--kv_heads=2", "--proxy_heads=1,2,4")
    heads = [option for option in heads if option.split("=")[0] in axes]
    options = ["--device", device, "--time-limit=0.01", "--json"]
    result = run([binary, *options, *heads, *TINY[stage]])
    if device == "cuda" and "build without CUDA" in result.stderr:
        pytest.skip(f"bench_{stage} was built without CUDA")
    assert result.returncode == 0, result.stdout + result.stderr
    header, *cases = json_lines(result.stdout)
    assert header["type"] == "header"
    assert {"device", "compiler", "build", "revision"} <= header.keys()
    assert cases
    for case in cases:
        assert case["bench"] == stage
        assert case["status"] == "ok"
        assert case["median_ms"] > 0
        assert case["samples"] >= 1


#: Sequences packed with and without pages, and one by one.
PACKED = (["--seqs=3,mix", "--page=0,16"], ["--seqs=3,mix", "--calls=each"])


@pytest.mark.parametrize("axes", PACKED, ids=["one-call", "one-by-one"])
@pytest.mark.parametrize("stage", ["attention", "pipeline"])
def test_packed_sequences(stage, axes, device):
    """Each looked at sequence is held against dense stages."""
    binary = find_binary(f"bench_{stage}")
    options = ["--device", device, "--repeats=1", "--json", "--q_heads=4", "--kv_heads=2"]
    result = run([binary, *options, *TINY[stage], "--length=300", "--dtype=bf16", *axes])
    if device == "cuda" and "build without CUDA" in result.stderr:
        pytest.skip(f"bench_{stage} was built without CUDA")
    assert result.returncode == 0, result.stdout + result.stderr
    cases = json_lines(result.stdout)[1:]
    assert len(cases) > 4 and all(case["status"] == "ok" for case in cases)


def test_a_pack_of_equals_counts_what_a_batch_does():
    binary = find_binary("bench_attention")
    common = ["--length=256", "--q_heads=4", "--kv_heads=2", "--head_dim=64", "--dtype=fp32"]
    common += ["--lists=nested:0.5", "--block_size=64", "--json"]
    flops = []
    for axes in (
        ["--batch=3"],
        ["--seqs=3"],
        ["--seqs=3", "--page=32"],
        ["--seqs=3", "--calls=each"],
    ):
        result = run([binary, *common, *axes])
        assert result.returncode == 0, result.stdout + result.stderr
        case = json_lines(result.stdout)[1]
        flops.append(case["tflops"] * case["median_ms"])
    # Lists are drawn anew for each entry of a batch, but are as long as those of the first.
    assert flops == pytest.approx([flops[0]] * 4, rel=1e-3)


def test_attention_counts_executed_blocks():
    binary = find_binary("bench_attention")
    common = ["--length=256", "--q_heads=2", "--kv_heads=1", "--head_dim=64", "--dtype=fp32"]
    result = run([binary, *common, "--lists=all,random:0.01", "--block_size=128", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    _, every, diagonal = json_lines(result.stdout)
    # Of 2 heads and 2 query blocks: 3 visible blocks each, and 2 on the diagonal.
    for case, blocks in ((every, 6), (diagonal, 4)):
        flops = case["tflops"] * 1e12 * case["median_ms"] / 1e3
        assert flops == pytest.approx(4 * 64 * 128 * 128 * blocks, rel=1e-3)
    dense = every["dense_tflops"] * 1e12 * every["median_ms"] / 1e3
    assert dense == pytest.approx(4 * 2 * 256 * 256 * 64 / 2, rel=1e-3)
    assert diagonal["dense_tflops"] == 0


def test_attention_counts_the_blocks_that_a_window_touches():
    binary = find_binary("bench_attention")
    common = ["--length=512", "--q_heads=2", "--kv_heads=1", "--head_dim=64", "--dtype=fp32"]
    options = ["--lists=all", "--block_size=128", "--window=1,129,512", "--json"]
    result = run([binary, *common, *options])
    assert result.returncode == 0, result.stdout + result.stderr
    _, *cases = json_lines(result.stdout)
    # Of 4 query blocks: its own, the one before too, and all.
    for case, blocks in zip(cases, (4, 7, 10), strict=True):
        flops = case["tflops"] * 1e12 * case["median_ms"] / 1e3
        assert flops == pytest.approx(4 * 64 * 128 * 128 * 2 * blocks, rel=1e-3)
        assert case["dense_tflops"] == 0


def test_pool_counts_what_it_must_read():
    binary = find_binary("bench_pool")
    shape = ["--length=202", "--q_heads=6", "--kv_heads=2", "--proxy_heads=6", "--head_dim=64"]
    result = run([binary, *shape, "--pooling=mean,first", "--dtype=fp32", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    _, mean, first = json_lines(result.stdout)
    # 8 heads read, of all tokens or of 51 windows' first; 6 query and 2 key proxies written.
    for case, tokens in ((mean, 202), (first, 51)):
        read = case["gb_per_s"] * 1e9 * case["median_ms"] / 1e3
        assert read == pytest.approx(4 * 64 * 8 * (tokens + 51), rel=1e-3)


def test_table_names_the_cases():
    binary = find_binary("bench_pool")
    result = run([binary, "--length=64,128", "--pooling=mean", "--time-limit=0.01", "--cold"])
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith("# revision: ") for line in lines)
    assert "# cache: cold" in lines
    assert [line.split()[0] for line in lines[-2:]] == ["length=64", "length=128"]


def test_list_and_filter():
    binary = find_binary("bench_score")
    options = ["--length=128,256", "--proxy_heads=2", "--mass=0,1"]
    every = run([binary, "--list", *options]).stdout.splitlines()
    assert len(every) == 4
    some = run([binary, "--list", *options, "--filter=length=256"]).stdout.splitlines()
    assert some == [line for line in every if "length=256" in line]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lenght=5"], "bench: options must be those of --help, got --lenght"),
        (["--repeats=many"], "bench: --repeats must be an integer, got many"),
        (["--device=tpu"], "bench: --device must be cpu or cuda, got tpu"),
        (["--filter"], "bench: --filter must be followed by a value"),
    ],
)
def test_wrong_command_line(options, message):
    result = run([find_binary("bench_pool"), *options])
    assert result.returncode == 2
    assert result.stderr.strip() == message


@pytest.mark.parametrize(
    ("bench", "options", "message"),
    [
        ("pool", ["--head_dim=100"], "pool_heads: head_dim must be a multiple of 8 up to 256"),
        ("pool", ["--pooling=last"], "bench: pooling must be mean or first, got last"),
        (
            "attention",
            ["--lists=random:0.5", "--window=8"],
            "bench: window must be 0 unless lists is all",
        ),
        ("score", ["--proxy_heads=3"], "score_blocks: k_proxy must have heads that divide"),
        ("select", ["--mode=all"], "bench: mode must be top_p or last_block, got all"),
    ],
)
def test_failed_case_is_named(bench, options, message):
    result = run([find_binary(f"bench_{bench}"), "--length=64", *options])
    assert result.returncode == 1
    assert f"failed: {message}" in result.stdout


# ---- compare.py


def write_run(path: Path, times: dict[str, float], status: str = "ok", device: str = "x") -> Path:
    lines = [{"type": "header", "bench": "pool", "device": device}]
    for length, median_ms in times.items():
        case = {"type": "case", "bench": "pool", "case": {"length": length}, "status": status}
        lines.append({**case, "median_ms": median_ms} if status == "ok" else case)
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def compare(tmp_path: Path, old: dict, new: dict, **options) -> subprocess.CompletedProcess:
    old_file = write_run(tmp_path / "old.json", old)
    new_file = write_run(tmp_path / "new.json", new, **options)
    return run([sys.executable, ROOT / "bench/compare.py", old_file, new_file])


def test_compare_finds_a_regression(tmp_path):
    result = compare(tmp_path, {"1": 1.0, "2": 2.0}, {"1": 1.0, "2": 2.07})
    assert result.returncode == 1
    slower = [line for line in result.stdout.splitlines() if "SLOWER" in line]
    assert len(slower) == 1
    assert "length=2" in slower[0] and "+3.5%" in slower[0]


def test_compare_passes_noise_and_improvement(tmp_path):
    result = compare(tmp_path, {"1": 1.0, "2": 2.0}, {"1": 1.029, "2": 1.0})
    assert result.returncode == 0, result.stdout
    assert "SLOWER" not in result.stdout
    assert "faster" in result.stdout


def test_compare_refuses_what_no_longer_runs(tmp_path):
    result = compare(tmp_path, {"1": 1.0}, {"1": 0.0}, status="wrong")
    assert result.returncode == 1
    assert "1 no longer run" in result.stdout


def test_compare_without_common_cases(tmp_path):
    result = compare(tmp_path, {"1": 1.0}, {"2": 1.0})
    assert result.returncode == 2


def test_compare_notes_another_device(tmp_path):
    result = compare(tmp_path, {"1": 1.0}, {"1": 1.0}, device="y")
    assert result.returncode == 0
    assert "note: device differs: x and y" in result.stdout


# ---- compare_peers.py


def test_peers_on_cpu(tmp_path):
    out = tmp_path / "peers.json"
    script = ROOT / "bench/compare_peers.py"
    options = ["--device=cpu", "--lengths=150", "--heads=2/1", "--proxies=2/1/1", f"--json={out}"]
    options += [
        "--densities=0.5",
        "--dtype=fp32",
        "--head-dim=64",
        "--time-limit=100",
        "--rounds=2",
        "--hold=0.001",
    ]
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    result = run(
        [sys.executable, script, *options],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    header, *cases = json_lines(out.read_text())
    assert header["type"] == "header"
    assert {case["status"] for case in cases} == {"ok"}, result.stdout
    assert {case["bench"] for case in cases} == {
        f"peers.{section}"
        for section in (
            "dense",
            "sparse",
            "select",
            "estimate",
            "end2end",
            "serving",
            "chunks",
            "windows",
        )
    }
    checked = [case for case in cases if case["bench"] != "peers.estimate"]
    assert {case["case"]["who"].split()[0] for case in checked} == {"proxyattn", "torch"}
    # Both are fp32 and so is the exact attention that they are held against.
    assert all(case["error"] < 1e-5 for case in checked)


def test_peers_mix_is_what_it_says(monkeypatch):
    """32 sequences from 1K to 64K tokens, 256K together."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from peers_packs import mix_lengths

    lengths = mix_lengths(65536)
    assert len(lengths) == 32 and (min(lengths), max(lengths)) == (1024, 65536)
    assert sum(lengths) == pytest.approx(262144, rel=1e-3)
    assert lengths != sorted(lengths)


def test_peers_pages_hold_the_tokens(monkeypatch):
    """In any order, and nothing else is named."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from peers_inputs import Shape
    from peers_packs import random_pack

    pack = random_pack(Shape(200, 2, 1, 64), torch.float32, torch.device("cpu"))
    given = pack.arguments(page=16)
    assert given["seqused_k"].tolist() == pack.lengths
    for i, length in enumerate(pack.lengths):
        pages = given["block_table"][i, : -(-length // 16)].long()
        for name in "kv":
            tokens = given[name][pages].flatten(0, 1)
            assert torch.equal(tokens[:length], getattr(pack, name)[pack.tokens(i)])
            assert tokens[length:].isnan().all()


def test_peers_lists_hold_the_chosen_blocks(monkeypatch):
    """Lists with the diagonal block apart, as FlashAttention-4 and flex_attention take them."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from peers import diagonal_lists
    from peers_inputs import Shape, random_blocks

    chosen = random_blocks(Shape(1024, 2, 1, 64), 128, 0.5, torch.device("cpu"))
    visible = torch.ones(8, 8, dtype=torch.bool).tril()
    assert not (chosen.mask & ~visible).any()
    assert chosen.mask.sum(-1).tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * 2
    full_indices, full_counts = chosen.lists(with_diagonal=False, compact=True)
    masked_indices, masked_counts = diagonal_lists(chosen, width=1)
    assert masked_counts.unique().tolist() == [1]
    for head in range(2):
        for row in range(8):
            full = full_indices[0, head, row, : full_counts[0, head, row]].tolist()
            assert full == sorted(full)
            assert masked_indices[0, head, row].tolist() == [row]
            assert [*full, row] == chosen.mask[head, row].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    "option, error",
    [
        ("--sections=dens", "--sections must be of dense"),
        ("--without=nobody", "--without must be of torch SDPA"),
        ("--hold=-1", "--hold must be finite and at least 0, got -1.0"),
        ("--hold=nan", "--hold must be finite and at least 0, got nan"),
    ],
)
def test_peers_names_wrong_options(option, error):
    script = ROOT / "bench/compare_peers.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = run([sys.executable, script, "--device=cpu", option], env=env)
    assert result.returncode == 2
    assert error in result.stderr
