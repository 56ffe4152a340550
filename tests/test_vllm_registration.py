"""How proxyattn.vllm makes itself known: what is imported when, and to which versions of vLLM."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import proxyattn.vllm
import pytest
import vllm_stub
from proxyattn.vllm import _notices
from proxyattn.vllm._registration import is_chosen

GPU = "proxyattn.vllm._gpu.ProxyBackend"
CPU = "proxyattn.vllm._cpu.Backend"


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(_notices, "_said", set())


def test_the_entry_point_is_the_function():
    project = Path(__file__).parent.parent.joinpath("pyproject.toml").read_text()
    entry = '[project.entry-points."vllm.general_plugins"]\nproxyattn = "proxyattn.vllm:register"\n'
    assert entry in project
    assert "vllm" not in re.search(r"^dependencies = .*$", project, re.M)[0]


def test_importing_it_imports_neither_vllm_nor_transformers():
    code = (
        "import sys, proxyattn.vllm\n"
        "print([name for name in ('vllm', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("version", vllm_stub.VERSIONS)
def test_it_registers_any_number_of_times_and_imports_no_backend(monkeypatch, caplog, version):
    _, backends = vllm_stub.install(monkeypatch, version)
    for _ in range(3):
        proxyattn.vllm.register()
    assert backends.CUSTOM.get_path() == GPU
    assert ("PROXYATTN" in backends.__members__) == (version == "0.33")
    assert not backends.CPU_ATTN.is_overridden()
    assert "proxyattn.vllm._sparse" not in sys.modules and not caplog.records


def test_on_cpus_it_stands_for_vllms_backend(monkeypatch):
    _, backends = vllm_stub.install(monkeypatch, "0.33", device="cpu")
    proxyattn.vllm.register()
    assert backends.CPU_ATTN.get_path() == CPU


def test_a_custom_backend_of_somebody_else_stays(monkeypatch, caplog):
    _, backends = vllm_stub.install(monkeypatch, "0.33")
    sys.modules["vllm.v1.attention.backends.registry"].register_backend(backends.CUSTOM, "a.B")
    proxyattn.vllm.register()
    proxyattn.vllm.register()
    (line,) = caplog.records
    assert "attention backend CUSTOM is a.B already and stays it" in line.getMessage()
    assert backends.CUSTOM.get_path() == "a.B" and "PROXYATTN" in backends.__members__


def test_a_vllm_without_a_registry_is_left_alone(monkeypatch, caplog):
    vllm_stub.install(monkeypatch, "0.26")
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    proxyattn.vllm.register()
    (line,) = caplog.records
    assert "this vLLM has no registry of attention backends" in line.getMessage()


def test_a_vllm_that_lacks_something_is_named_when_the_backend_is_chosen(monkeypatch):
    vllm_stub.install(monkeypatch, "0.26", without=("seq_lens_cpu_upper_bound",))
    proxyattn.vllm.register()
    with pytest.raises(
        RuntimeError,
        match=r"proxyattn.vllm: vLLM must have CommonAttentionMetadata.seq_lens_cpu_upper_bound, "
        r"got vLLM 0.26.0; 0.26.0 and 0.33.0 are",
    ):
        import_module("proxyattn.vllm._gpu")


@pytest.mark.parametrize("flash", [True, False], ids=["flash", "triton"])
def test_the_parent_is_what_is_installed(monkeypatch, flash):
    vllm_stub.install(monkeypatch, "0.33", flash=flash)
    gpu = import_module("proxyattn.vllm._gpu")
    name = "flash_attn.FlashAttention" if flash else "triton_attn.TritonAttention"
    module, _, prefix = name.partition(".")
    parents = vars(sys.modules[f"vllm.v1.attention.backends.{module}"])
    assert issubclass(gpu.ProxyBackend, parents[f"{prefix}Backend"])
    assert issubclass(gpu.ProxyBuilder, parents[f"{prefix}MetadataBuilder"])
    assert issubclass(gpu.ProxyImpl, parents[f"{prefix}Impl"])


def test_triton_is_the_parent_where_flash_attention_cannot_be_imported(monkeypatch):
    vllm_stub.install(monkeypatch, "0.33")
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.flash_attn", None)
    monkeypatch.delattr(sys.modules["vllm.v1.attention.backends"], "flash_attn")
    gpu = import_module("proxyattn.vllm._gpu")
    assert gpu.ProxyImpl.__mro__[2].__name__ == "TritonAttentionImpl"


class Named:
    def __init__(self, name):
        self.name = name


class Config:
    def __init__(self, backend, **kinds):
        self.backend = backend and Named(backend)
        self.backend_per_kind = {kind: Named(name) for kind, name in kinds.items()}


def test_it_is_chosen_for_all_layers_or_for_some():
    assert is_chosen(Config("CUSTOM")) and is_chosen(Config("PROXYATTN"))
    assert is_chosen(Config(None, full_attention="CUSTOM"))
    assert not is_chosen(Config(None)) and not is_chosen(Config("FLASH_ATTN"))
