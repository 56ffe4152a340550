"""Devices, seeds and the choice of cases. Every case that names `device` runs on each device."""

import fcntl
import os

# Before numpy loads: the reference's products are small, and threads that wait for each other take
# the cores from the kernels under test.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Workers of pytest-xdist share the cores, and so do the processes that their tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _cores = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores)))

import proxyattn
import pytest
import torch
from ranks import Ranks


def pytest_addoption(parser):
    parser.addoption("--only-cuda", action="store_true", help="only the cases that need a GPU")


def _missing_cuda() -> str | None:
    """Why there are no CUDA cases here, or None when there are."""
    if not any(config["device"] == "cuda" for config in proxyattn.supported_configs()):
        return "this build of proxyattn has no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None


def _require_cuda():
    reason = _missing_cuda()
    if reason is None:
        return
    if os.environ.get("PROXYATTN_REQUIRE_CUDA", "0") not in ("", "0"):
        pytest.fail(f"PROXYATTN_REQUIRE_CUDA is set, but {reason}")
    pytest.skip(f"needs CUDA: {reason}")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> str:
    if request.param == "cuda":
        _require_cuda()
    return request.param


@pytest.fixture
def cuda() -> str:
    """For what only a GPU can show."""
    _require_cuda()
    return "cuda"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _memory_goes_back():
    """Workers of pytest-xdist share a GPU, and torch keeps what a test has freed."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture
def much_memory(tmp_path_factory):
    """For tests that take many gigabytes of a GPU: of all workers one runs such a test."""
    with (tmp_path_factory.getbasetemp().parent / "much_memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Four processes of a gloo group."""
    processes = Ranks(tmp_path_factory.mktemp("ranks"), world=4)
    yield processes
    processes.stop()


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _is_fp32_on_cuda(item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    case = params.get("case")
    of_case = case.get("dtype") if isinstance(case, dict) else getattr(case, "dtype", None)
    dtype = params.get("dtype", of_case)
    return params.get("device") == "cuda" and dtype == torch.float32


def _needs_cuda(item) -> bool:
    params = getattr(getattr(item, "callspec", None), "params", {})
    named = "cuda" in item.fixturenames or "cuda" in item.path.stem
    return named or params.get("device") == "cuda"


def pytest_collection_modifyitems(config, items):
    """Leaves out float32 on GPUs, which has no kernels (test_errors.py holds them to refusing it),
    the slow sweeps, unless the command line asks for them, and what --only-cuda doesn't want."""
    only_cuda = config.getoption("only_cuda")
    wants_slow = "slow" in config.option.markexpr or any("::" in arg for arg in config.args)
    dropped = [
        item
        for item in items
        if _is_fp32_on_cuda(item)
        or (item.get_closest_marker("slow") and not wants_slow)
        or (only_cuda and not _needs_cuda(item))
    ]
    config.hook.pytest_deselected(items=dropped)
    dropped = set(dropped)
    items[:] = [item for item in items if item not in dropped]
