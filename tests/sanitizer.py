"""Runs every op once on small ragged shapes on the GPU, for NVIDIA's checkers of memory and races:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitizer.py
    compute-sanitizer --tool racecheck python tests/sanitizer.py

(and initcheck, synccheck likewise). An argument such as 2/6 runs the second of six parts, so that
the slow checkers can work side by side. Without torch's cache every tensor is an allocation of its
own, so that memcheck sees the first byte that is read or written beside it. It is no test on its
own: it only looks whether the results are finite.
"""

import itertools
import os
import sys

import proxyattn
import torch
from arguments import smallest_workspace
from packs import OPS, WITH_OUT, arguments_of, random_pack


def random_tensor(*shape, dtype):
    return torch.randn(shape, device="cuda").to(dtype)


def assert_finite(*tensors):
    for tensor in tensors:
        assert tensor.isfinite().all()


#: Poolings, with proxies above, below and at the two kv heads.
POOLINGS = (("mean", 4), ("mean", 1), ("first", 2))


#: Of more than a block, so that the rows of a tile see different ones.
WINDOW = 70


def run_stages(q_len, kv_len, causal, head_dim, block_size, stride, dtype, pooling, proxies):
    q = random_tensor(1, q_len, 4, head_dim, dtype=dtype)
    k, v = (random_tensor(1, kv_len, 2, head_dim, dtype=dtype) for _ in range(2))
    lengths = (q_len, kv_len)
    settings = (*lengths, stride, block_size, causal)
    pooled = proxyattn.pool_heads(q, k, proxies, stride, pooling)
    for window in (None, WINDOW) if causal else (None,):
        inside = {"window": window}
        proxyattn.score_blocks(*pooled, *settings, **inside)
        peak, mass = proxyattn.score_blocks(*pooled, *settings, with_mass=True, **inside)
        shares = proxyattn.estimate_shares(q, k, block_size, causal, **inside)
        budgets = proxyattn.estimate_budgets(q, k, 0.7, block_size, causal, **inside)
        assert_finite(mass, shares)
        for mode, needs in (("top_p", shares), ("last_block", budgets)):
            choice = (*lengths, 4, block_size, causal, mode, 0.7)
            lists = proxyattn.select_blocks(peak, mass, needs, *choice, min_budget=0, **inside)
            results = proxyattn.block_sparse_attention(
                q, k, v, *lists, block_size, causal, return_lse=True, **inside
            )
            assert_finite(*results)
    for mode in ("top_p", "last_block"):
        run_pipelines(q, k, v, causal, stride, pooling, block_size, proxies, mode)


def run_pipelines(q, k, v, causal, stride, pooling, block_size, proxies, mode):
    settings = {
        "causal": causal,
        "stride": stride,
        "pooling": pooling,
        "block_size": block_size,
        "num_proxy_heads": proxies,
        "budget_mode": mode,
        "min_budget": 0,
    }
    for gamma in (0.7, 1.0):
        proxyattn.choose_blocks(q, k, gamma=gamma, **settings)
        assert_finite(proxyattn.proxy_attention(q, k, v, gamma=gamma, **settings))
    if mode == "top_p":
        zeros = torch.zeros(1, 4, device="cuda")
        assert_finite(proxyattn.proxy_attention(q, k, v, gamma=0.7, shares=zeros, **settings))
    if causal:
        sinks = torch.ones(4, device="cuda")
        for gamma in (0.7, 1.0):
            inside = {"gamma": gamma, "window": WINDOW, **settings}
            proxyattn.choose_blocks(q, k, **inside)
            assert_finite(proxyattn.proxy_attention(q, k, v, **inside, sink_logits=sinks))


#: Ragged, empty, behind a cached prefix, and more queries than keys.
PACKED_LENGTHS = [(130, 130), (0, 70), (70, 331), (65, 20), (1, 1)]
#: Modes, gammas and windows.
PACKED_CHOICES = (
    ("top_p", 0.7, None),
    ("last_block", 0.7, None),
    ("top_p", 1.0, None),
    ("top_p", 0.7, WINDOW),
    ("last_block", 0.7, WINDOW),
)
#: Where their keys lie, and how.
PLACES = ((None, "two"), (16, "halves"), (64, "pairs"), (128, "heads_first"))


def run_packed(page, cache, head_dim, block_size, stride, dtype, pooling, proxies):
    """Tokens that belong to no sequence are NaN, and tables name pages that there are none of."""
    pack = random_pack("cuda", PACKED_LENGTHS, (4, 2), head_dim, dtype, page, cache)
    used = slice(0, pack.rest().start)
    settings = {
        "block_size": block_size,
        "stride": stride,
        "pooling": pooling,
        "num_proxy_heads": proxies,
        "min_budget": 0,
    }
    for op in OPS:
        arguments = arguments_of(op, pack)
        if op == "block_sparse_attention_varlen":
            # Its lists are of blocks of 64.
            assert_finite(getattr(proxyattn, op)(**arguments, block_size=64)[0][used])
            continue
        for mode, gamma, window in PACKED_CHOICES:
            chain = {**arguments, **settings, "budget_mode": mode, "gamma": gamma, "window": window}
            # In one piece, and query block by query block.
            for limit in (None, smallest_workspace(chain, op=op)):
                result = getattr(proxyattn, op)(**chain, max_workspace_bytes=limit)
                if op in WITH_OUT:
                    assert_finite(result[used])


def packed_cases():
    """Every head_dim and block size meets every place of keys in one of the families."""
    axes = itertools.product(("", "sm80"), (64, 128, 256), (64, 128), PLACES)
    return [case for i, case in enumerate(axes) if (i + i // 8) % 2 == 0]


def main():
    torch.manual_seed(0)
    shapes = [(1, 1, True), (65, 65, True), (130, 331, True), (200, 77, False)]
    cases = list(itertools.product(("", "sm80"), shapes, (64, 128, 256), (64, 128)))
    # Every head_dim and block size meets every pooling.
    cases = [(*case, *POOLINGS[(i + i // 6) % 3]) for i, case in enumerate(cases)]
    part, parts = (int(number) for number in (sys.argv[1] if sys.argv[1:] else "1/1").split("/"))
    mine = cases[part - 1 :: parts]
    for family, (q_len, kv_len, causal), head_dim, block_size, pooling, proxies in mine:
        os.environ["PROXYATTN_FAMILY"] = family
        dtype = torch.float16 if block_size == 64 else torch.bfloat16
        stride = {64: 1, 128: 4, 256: 8}[head_dim]
        run_stages(q_len, kv_len, causal, head_dim, block_size, stride, dtype, pooling, proxies)
    packed = packed_cases()
    for i, (family, head_dim, block_size, place) in enumerate(packed[part - 1 :: parts]):
        os.environ["PROXYATTN_FAMILY"] = family
        dtype = torch.float16 if block_size == 64 else torch.bfloat16
        stride = {64: 1, 128: 4, 256: 8}[head_dim]
        run_packed(*place, head_dim, block_size, stride, dtype, *POOLINGS[i % 3])
    torch.cuda.synchronize()
    count = len(mine) + len(packed[part - 1 :: parts])
    print(f"all ops ran, {count} of {len(cases) + len(packed)} cases")


if __name__ == "__main__":
    main()
