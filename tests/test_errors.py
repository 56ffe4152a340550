"""Every wrong argument, the type of the error, and its whole sentence."""

from dataclasses import dataclass

import proxyattn
import pytest
import torch
from arguments import good_arguments, message_of

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Bad:
    """Arguments to replace: values, or functions of the good one."""

    ops: str
    changes: dict
    error: type
    message: str  # after "<op>: "

    def __str__(self):
        return "-".join([self.ops.split()[0], *self.changes, self.message[:40]]).replace(" ", "_")


def halved(x):
    return x[..., ::2]


def to(*args):
    return lambda x: x.to(*args)


def heads(count):
    return lambda x: x[:, :, :1].expand(-1, -1, count, -1)


ESTIMATING = "estimate_budgets estimate_shares"
PIPELINES = "choose_blocks proxy_attention"
POOLING = f"pool_heads {PIPELINES}"
SELECTING = f"select_blocks {PIPELINES}"
WITH_V = "block_sparse_attention proxy_attention"
WITH_K = f"{ESTIMATING} {POOLING} block_sparse_attention"
WITH_SCALE = f"score_blocks {ESTIMATING} {PIPELINES} block_sparse_attention"
WITH_BLOCKS = f"{WITH_SCALE} select_blocks"
BAD_ARGUMENTS = [
    # ---- ranks and shapes
    Bad(
        WITH_K,
        {"q": lambda x: x[0]},
        ValueError,
        "q must have 4 dimensions, got shape [100, 4, 64]",
    ),
    Bad(
        WITH_K,
        {"k": lambda x: x[None]},
        ValueError,
        "k must have 4 dimensions, got shape [1, 2, 200, 2, 64]",
    ),
    Bad(
        WITH_K,
        {"k": lambda x: x[:1]},
        ValueError,
        "k must have shape [2, 200, 2, 64], got shape [1, 200, 2, 64]",
    ),
    Bad(
        WITH_K,
        {"k": lambda x: x.repeat(1, 1, 1, 2)},
        ValueError,
        "k must have shape [2, 200, 2, 64], got shape [2, 200, 2, 128]",
    ),
    Bad(
        WITH_V,
        {"v": lambda x: x[:, :199]},
        ValueError,
        "v must have shape [2, 200, 2, 64], got shape [2, 199, 2, 64]",
    ),
    Bad(
        WITH_V,
        {"v": heads(4)},
        ValueError,
        "v must have shape [2, 200, 2, 64], got shape [2, 200, 4, 64]",
    ),
    Bad(
        WITH_V,
        {"v": lambda x: x[0, 0]},
        ValueError,
        "v must have 4 dimensions, got shape [2, 64]",
    ),
    Bad(
        "score_blocks",
        {"q_proxy": lambda x: x[:, :24]},
        ValueError,
        "q_proxy must have shape [2, 25, 2, 64], got shape [2, 24, 2, 64]",
    ),
    Bad(
        "score_blocks",
        {"k_proxy": lambda x: x[:, :49]},
        ValueError,
        "k_proxy must have shape [2, 50, 2, 64], got shape [2, 49, 2, 64]",
    ),
    Bad(
        "score_blocks",
        {"k_proxy": lambda x: x[:1]},
        ValueError,
        "k_proxy must have shape [2, 50, 2, 64], got shape [1, 50, 2, 64]",
    ),
    Bad(
        "score_blocks",
        {"k_proxy": lambda x: x[0]},
        ValueError,
        "k_proxy must have 4 dimensions, got shape [50, 2, 64]",
    ),
    Bad(
        "select_blocks",
        {"peak": lambda x: x[0]},
        ValueError,
        "peak must have 4 dimensions, got shape [2, 2, 4]",
    ),
    Bad(
        "select_blocks",
        {"peak": lambda x: x[..., :3]},
        ValueError,
        "peak must have shape [2, 2, 2, 4], got shape [2, 2, 2, 3]",
    ),
    Bad(
        "select_blocks",
        {"needs": lambda x: x[0]},
        ValueError,
        "needs must have shape [2, 4], got shape [4]",
    ),
    Bad(
        "select_blocks",
        {"needs": lambda x: x[:1]},
        ValueError,
        "needs must have shape [2, 4], got shape [1, 4]",
    ),
    Bad(
        "select_blocks",
        {"num_heads": 6},
        ValueError,
        "needs must have shape [2, 6], got shape [2, 4]",
    ),
    Bad(
        "select_blocks",
        {"mass": lambda x: x[:, :1]},
        ValueError,
        "mass must have shape [2, 2, 2, 4], got shape [2, 1, 2, 4]",
    ),
    Bad(
        "select_blocks",
        {"mass": None},
        ValueError,
        "mass must be given with budget_mode 'top_p', got None",
    ),
    Bad(
        PIPELINES,
        {"shares": torch.zeros(4)},
        ValueError,
        "shares must have shape [2, 4], got shape [4]",
    ),
    Bad(
        PIPELINES,
        {"shares": torch.zeros(2, 2)},
        ValueError,
        "shares must have shape [2, 4], got shape [2, 2]",
    ),
    Bad(
        "block_sparse_attention",
        {"indices": lambda x: x[0]},
        ValueError,
        "indices must have 4 dimensions, got shape [2, 2, 4]",
    ),
    Bad(
        "block_sparse_attention",
        {"indices": lambda x: x[:, :, :1]},
        ValueError,
        "indices must have shape [2, 2, 2, 4], got shape [2, 2, 1, 4]",
    ),
    Bad(
        "block_sparse_attention",
        {"counts": lambda x: x[:, :2]},
        ValueError,
        "counts must have shape [2, 4, 2], got shape [2, 2, 2]",
    ),
    Bad(
        "block_sparse_attention",
        {"counts": lambda x: x[0, 0]},
        ValueError,
        "counts must have 3 dimensions, got shape [2]",
    ),
    # ---- dtypes
    Bad(
        WITH_K,
        {"k": to(torch.float16)},
        TypeError,
        "k must have the dtype of q, bfloat16, got float16",
    ),
    Bad(
        WITH_V,
        {"v": to(torch.float16)},
        TypeError,
        "v must have the dtype of q, bfloat16, got float16",
    ),
    Bad(
        "score_blocks",
        {"k_proxy": to(torch.float16)},
        TypeError,
        "k_proxy must have the dtype of q_proxy, bfloat16, got float16",
    ),
    Bad(
        "select_blocks",
        {"peak": to(torch.bfloat16)},
        TypeError,
        "peak must have dtype float32, got bfloat16",
    ),
    Bad(
        "select_blocks",
        {"mass": to(torch.float64)},
        TypeError,
        "mass must have dtype float32, got float64",
    ),
    Bad(
        "select_blocks",
        {"needs": to(torch.int32)},
        TypeError,
        "needs must have dtype float32, got int32",
    ),
    Bad(
        "select_blocks",
        {"budget_mode": "last_block"},
        TypeError,
        "needs must have dtype int32, got float32",
    ),
    Bad(
        PIPELINES,
        {"shares": torch.zeros(2, 4, dtype=torch.float64)},
        TypeError,
        "shares must have dtype float32, got float64",
    ),
    Bad(
        "block_sparse_attention",
        {"indices": to(torch.int64)},
        TypeError,
        "indices must have dtype int32, got int64",
    ),
    Bad(
        "block_sparse_attention",
        {"counts": to(torch.float32)},
        TypeError,
        "counts must have dtype int32, got float32",
    ),
    # ---- layout
    Bad(
        f"pool_heads {ESTIMATING}",
        {"q": halved, "k": halved},
        ValueError,
        "q must be contiguous in its last dimension, got strides [25600, 256, 64, 2]",
    ),
    Bad(
        WITH_V,
        {"v": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
        ValueError,
        "v must be contiguous in its last dimension, got strides [25600, 128, 1, 2]",
    ),
    # ---- heads and head_dim
    Bad(
        WITH_K,
        {"q": heads(7)},
        ValueError,
        "kv_heads must divide q_heads, got q_heads=7, kv_heads=2",
    ),
    Bad(
        WITH_K,
        {"q": lambda x: x[:, :, :0]},
        ValueError,
        "q_heads must be at least 1, got q_heads=0",
    ),
    Bad(
        f"pool_heads {ESTIMATING}",
        {"k": lambda x: x[:, :, :0]},
        ValueError,
        "kv_heads must be at least 1, got kv_heads=0",
    ),
    Bad(
        f"pool_heads {ESTIMATING}",
        {"q": lambda x: x[..., :36], "k": lambda x: x[..., :36]},
        ValueError,
        "head_dim must be a multiple of 8 up to 256, got head_dim=36",
    ),
    *(
        Bad(
            POOLING,
            {"num_proxy_heads": value},
            ValueError,
            "num_proxy_heads must divide kv_heads or be a multiple of it that divides q_heads, "
            f"got num_proxy_heads={value}, kv_heads=2, q_heads=4",
        )
        for value in (3, 0, -1, -2, 6, 8)
    ),
    Bad(
        "score_blocks",
        {"q_proxy": lambda x: x[:, :, :0], "k_proxy": lambda x: x[:, :, :0]},
        ValueError,
        "num_proxy_heads must be at least 1, got num_proxy_heads=0",
    ),
    *(
        Bad(
            "score_blocks",
            {"k_proxy": heads(count)},
            ValueError,
            "k_proxy must have heads that divide those of q_proxy, got "
            f"k_proxy.size(2)={count}, q_proxy.size(2)=2",
        )
        for count in (0, 3, 4)
    ),
    *(
        Bad(
            "select_blocks",
            {"num_heads": count},
            ValueError,
            f"num_proxy_heads must divide q_heads, got num_proxy_heads=2, q_heads={count}",
        )
        for count in (3, 1)
    ),
    Bad(
        "block_sparse_attention",
        {"indices": lambda x: x[:, :1].expand(-1, 3, -1, -1)},
        ValueError,
        "indices must hold lists for a number of heads that divides q_heads, got "
        "indices.size(1)=3, q_heads=4",
    ),
    # ---- sizes
    *(
        Bad(
            WITH_BLOCKS,
            {"block_size": value},
            ValueError,
            f"block_size must be one of 64, 128, got block_size={value}",
        )
        for value in (96, 32, 0, -64)
    ),
    *(
        Bad(
            f"score_blocks {POOLING}",
            {"stride": value},
            ValueError,
            f"stride must be one of 1, 2, 4, 8, got stride={value}",
        )
        for value in (3, 16, 0, -4)
    ),
    *(
        Bad(
            f"{ESTIMATING} {PIPELINES} block_sparse_attention",
            {"k": lambda x, n=n: x[:, :n], "v": lambda x, n=n: x[:, :n]},
            ValueError,
            f"q_len must be at most kv_len when causal, got q_len=100, kv_len={n}",
        )
        for n in (99, 0)
    ),
    Bad(
        "score_blocks select_blocks",
        {"q_len": 201},
        ValueError,
        "q_len must be at most kv_len when causal, got q_len=201, kv_len=200",
    ),
    Bad(
        "score_blocks select_blocks",
        {"q_len": -1},
        ValueError,
        "q_len must be at least 0, got q_len=-1",
    ),
    Bad(
        "score_blocks select_blocks",
        {"kv_len": -5, "causal": False},
        ValueError,
        "kv_len must be at least 0, got kv_len=-5",
    ),
    # ---- numbers
    *(
        Bad(
            WITH_SCALE,
            {"scale": value},
            ValueError,
            f"scale must be finite and positive, got scale={text}",
        )
        for value, text in ((NAN, "nan"), (0.0, "0"), (-0.5, "-0.5"), (INF, "inf"), (1e39, "inf"))
    ),
    Bad(
        f"estimate_budgets {SELECTING}",
        {"gamma": NAN},
        ValueError,
        "gamma must be a number, got gamma=nan",
    ),
    Bad(
        SELECTING,
        {"min_budget": -1},
        ValueError,
        "min_budget must be at least 0, got min_budget=-1",
    ),
    *(
        Bad(
            f"estimate_shares {SELECTING}",
            {name: -1},
            ValueError,
            f"{name} must be at least 0, got {name}=-1",
        )
        for name in ("num_sink_blocks", "num_local_blocks")
    ),
    # ---- words
    *(
        Bad(
            SELECTING,
            {"budget_mode": value},
            ValueError,
            f"budget_mode must be 'top_p' or 'last_block', got '{value}'",
        )
        for value in ("", "Top_p", "last block", "coverage")
    ),
    *(
        Bad(
            POOLING,
            {"pooling": value},
            ValueError,
            f"pooling must be 'mean' or 'first', got '{value}'",
        )
        for value in ("", "Mean", "max")
    ),
    Bad(
        PIPELINES,
        {"shares": torch.zeros(2, 4), "budget_mode": "last_block"},
        ValueError,
        "shares must be None with budget_mode 'last_block', got a tensor",
    ),
]
BAD_ON_CPUS = [
    Bad(
        WITH_K,
        {"q": to(torch.float64)},
        TypeError,
        "q must be float32, float16 or bfloat16, got float64",
    ),
    Bad(
        WITH_K,
        {"k": to(torch.int32)},
        TypeError,
        "k must be float32, float16 or bfloat16, got int32",
    ),
]
BAD_ON_GPUS = [
    Bad(
        WITH_K,
        {"q": to(torch.float64)},
        TypeError,
        "q must be float16 or bfloat16 on a GPU, got float64",
    ),
    Bad(
        WITH_K,
        {"q": to(torch.float32), "k": to(torch.float32)},
        TypeError,
        "q must be float16 or bfloat16 on a GPU, got float32",
    ),
]


def cases(table):
    return [pytest.param(op, bad, id=f"{op}-{bad}") for bad in table for op in bad.ops.split()]


def check(op, bad, device):
    arguments = good_arguments(op, device)
    for name, change in bad.changes.items():
        if isinstance(change, torch.Tensor):
            change = change.to(device)
        if name in arguments or not callable(change):
            arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(bad.error) as error:
        getattr(proxyattn, op)(**arguments)
    assert message_of(error) == f"{op}: {bad.message}"


@pytest.mark.parametrize(("op", "bad"), cases(BAD_ARGUMENTS))
def test_bad_argument(device, op, bad):
    check(op, bad, device)


@pytest.mark.parametrize(("op", "bad"), cases(BAD_ON_CPUS))
def test_bad_argument_on_cpus(op, bad):
    check(op, bad, "cpu")


@pytest.mark.parametrize(("op", "bad"), cases(BAD_ON_GPUS))
def test_bad_argument_on_gpus(cuda, op, bad):
    check(op, bad, cuda)
