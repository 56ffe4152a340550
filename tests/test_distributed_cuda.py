"""Two GPUs over NCCL: what one of them gives for the whole sequences, bit for bit."""

import proxyattn
import pytest
import torch
from proxyattn.distributed import context_parallel_attention
from ranks import Ranks
from sharded import Sharded, check_lists
from tolerance import assert_same_bits


@pytest.fixture(scope="module")
def gpus(tmp_path_factory):
    """Two processes of an NCCL group, each with a GPU."""
    if not any(config["device"] == "cuda" for config in proxyattn.supported_configs()):
        pytest.skip("needs two GPUs: this build of proxyattn has no CUDA kernels")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs: torch finds {torch.cuda.device_count()}")
    processes = Ranks(tmp_path_factory.mktemp("gpus"), world=2, backend="nccl")
    yield processes
    processes.stop()


def check(group, case):
    q, k, v = case.whole("cuda")
    shares = torch.full((case.batch, case.heads[0]), 0.2, device="cuda")
    settings = {**case.arguments, "shares": shares}
    want = proxyattn.proxy_attention(q, k, v, **settings, return_lse=True)
    call = case.call(group, "cuda")
    results = [
        context_parallel_attention(**call, **settings, return_lse=True, max_gather_bytes=limit)
        for limit in (None, None, 1 << 30)
    ]
    for out, lse in results:
        assert_same_bits(out, case.shard(want[0], group), "out")
        assert_same_bits(lse, case.shard(want[1], group, 2), "lse")
    check_lists(case, call, group, shares)


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize(
    ("tokens", "batch", "cached"),
    [(4096, 2, ()), (32768, 1, ()), (8192 - 37, 2, (4096,)), (2048, 1, (2048, 4096 - 48))],
    ids=str,
)
def test_of_one_gpu(gpus, layout, dtype, block_size, tokens, batch, cached):
    settings = {"block_size": block_size}
    case = Sharded(tokens, (16, 4, 4), layout, batch, cached, 128, dtype, settings=settings)
    gpus.run(2, check, case)


@pytest.mark.parametrize("heads", [(16, 2, 4), (8, 8, 2), (12, 3, 3)], ids=str)
def test_heads(gpus, heads):
    gpus.run(2, check, Sharded(8192, heads, dtype=torch.bfloat16))


def estimated(group, case):
    """With shares of this call: within rounding those of one process, and the same every time."""
    q, k, v = case.whole("cuda")
    call = case.call(group, "cuda")
    first, second = (context_parallel_attention(**call, **case.arguments) for _ in range(2))
    assert_same_bits(first, second)
    shares = proxyattn.estimate_shares(q, k)
    want = proxyattn.proxy_attention(q, k, v, **case.arguments, shares=shares)
    differing = (first != case.shard(want, group)).float().mean().item()
    assert differing < 0.02, "a block more or less where a mass lies at what is needed"


def test_estimated_shares(gpus):
    gpus.run(2, estimated, Sharded(16384, (16, 4, 4), head_dim=128, dtype=torch.bfloat16))
