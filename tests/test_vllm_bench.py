"""bench/vllm_latency.py: the shares that it sets, and a case of it on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_latency
from vllm_tiny import missing_vllm

SCRIPT = Path(__file__).parent.parent / "bench" / "vllm_latency.py"


@pytest.mark.parametrize("case", vllm_latency.cases(), ids=lambda case: case.name)
def test_budgets_read_the_share_that_is_said(case):
    if case.share is None:
        assert case.settings() == {}
        return
    budget = case.settings()["min_budget"] // 64
    read = seen = 0
    for length in case.lengths:
        for block in range(case.cached // 64, length // 64):
            read += min(block + 1, budget)
            seen += block + 1
    assert read / seen == pytest.approx(case.share, rel=0.02)


def run_script(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_cases_are_chosen_by_name():
    done = run_script("--list", "--cases", "decode*; first 128K, whole")
    assert done.stdout.splitlines() == ["first 128K, whole", "decode, 1 at 32K", "decode, 8 at 32K"]
    done = run_script("--cases", "nothing")
    assert done.returncode == 1
    assert done.stderr.strip() == "vllm_latency: --cases must name some, got 'nothing'"


@pytest.mark.skipif(missing_vllm() is not None, reason=f"needs vLLM for CPUs: {missing_vllm()}")
def test_it_runs_on_a_cpu(tmp_path):
    out = tmp_path / "times.json"
    case = "first 2K after 128K"
    done = run_script("--dry-run", "--repeats", "1", "--cases", case, "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"| {case} | 10.0% |")
    (result,) = json.loads(out.read_text())
    assert len(result["ours"]) == len(result["theirs"]) == 1 and result["rows"]["sparse"] > 0
