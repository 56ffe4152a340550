"""bench/context_parallel.py: a tiny run over gloo, and the model of its cost by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from context_parallel_model import Links, Problem

ROOT = Path(__file__).resolve().parent.parent


def test_on_cpu(tmp_path):
    out = tmp_path / "out.json"
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--device=cpu", "--lengths=500", "--heads=4/2", "--head-dim=64", "--dtype=fp32"]
    options += ["--rounds=1", "--read=0.5", f"--json={out}"]
    result = subprocess.run(
        [*launch, ROOT / "bench/context_parallel.py", *options],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    sparse, dense = (json.loads(line) for line in out.read_text().splitlines())
    assert (sparse["read"], dense["read"]) == (0.5, 1.0)
    for found in (sparse, dense):
        assert found["error"] < 1e-5 and found["world"] == 2
        assert found["gather_bytes"] == 2 * 500 * 2 * 64 * 4 / 2
        assert all(
            found[name] > 0 for name in found if name.endswith("_ms") and name != "pooling_ms"
        )
    assert "  500, 50.0 % |" in result.stdout and "  500,  dense |" in result.stdout


def test_without_torchrun():
    script = ROOT / "bench/context_parallel.py"
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)
    env = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    result = subprocess.run(
        [sys.executable, script],
        env={**env, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1
    assert "run it by torchrun --standalone --nproc-per-node 2" in result.stderr


def test_model():
    links = Links(bandwidth=100.0, latency=0.5)
    one = Problem(kv_bytes=800.0, groups=4, one_gpu=42.0, pooling=2.0, before=1.0)
    # Two ranks: 40 / 2 of work and 5 / 4 of pooling; 100 bytes a group arrive in 1.5.
    assert one.work(2) == pytest.approx(22.5)
    assert one.gather(2, links) == pytest.approx(1.5)
    assert one.seconds(2, links) == pytest.approx(1 + 1.5 + 22.5)
    assert one.speedup(2, links) == pytest.approx(42 / 25)
    assert one.hidden(2, links) == pytest.approx(3 / 4)
    # Links so slow that work waits for them: four gathers and the last group's work.
    slow = Links(bandwidth=10.0, latency=0.0)
    assert one.seconds(2, slow) == pytest.approx(1 + 4 * 10 + 22.5 / 4)
    assert one.hidden(2, slow) == pytest.approx(3 * 22.5 / 4 / 40)
    # One rank: nothing arrives.
    assert one.seconds(1, Links(1.0, 0.0)) == pytest.approx(43)
    assert one.hidden(1, Links(1.0, 0.0)) == 1
