"""What the package says about itself."""

import platform
from pathlib import Path

import proxyattn
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def test_supported_configs():
    """Every device and family has all head dims in all its dtypes."""
    rows = proxyattn.supported_configs()
    assert all(set(row) == {"device", "family", "head_dim", "dtype"} for row in rows)
    families = {}
    for row in rows:
        kernels = families.setdefault((row["device"], row["family"]), [])
        kernels.append((row["head_dim"], row["dtype"]))
    dtypes = {"cpu": ("float32", "float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
    for (device, family), kernels in families.items():
        assert len(set(kernels)) == len(kernels), family
        want = {(d, t) for d in (64, 128, 256) for t in dtypes[device]}
        assert set(kernels) == want, family
    assert ("cpu", "baseline") in families
    if any(device == "cuda" for device, _ in families):
        assert ("cuda", "sm80") in families


def test_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{proxyattn.__version__}"\n' in project


def test_public_names():
    assert sorted(proxyattn.__all__) == proxyattn.__all__
    for name in proxyattn.__all__:
        assert getattr(proxyattn, name).__doc__, name


def test_show_config(capsys):
    proxyattn.show_config()
    shown = capsys.readouterr().out
    assert f"proxyattn {proxyattn.__version__}" in shown
    assert f"torch     {torch.__version__}" in shown
    for config in proxyattn.supported_configs():
        assert any(
            line.startswith(config["device"])
            and config["family"] in line
            and str(config["head_dim"]) in line
            and config["dtype"] in line
            for line in shown.splitlines()
        ), config


def test_show_config_names_the_gpu(cuda, capsys):
    proxyattn.show_config()
    shown = capsys.readouterr().out
    major, minor = torch.cuda.get_device_capability()
    assert torch.cuda.get_device_name() in shown
    assert f"compute capability {major}.{minor}" in shown


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 has more CPU families")
def test_cpu_families_are_fastest_first():
    families = [row["family"] for row in proxyattn.supported_configs() if row["device"] == "cpu"]
    order = ["avx512", "avx2", "baseline"]
    assert list(dict.fromkeys(families)) == [name for name in order if name in families]
