"""What only a GPU can show: graphs, streams, devices, synchronisation, memory, kernel families."""

import json
import os
import subprocess
import sys

import proxyattn
import pytest
import torch
from arguments import OPS, PIPELINES, all_tensors, good_arguments, smallest_workspace
from inputs import runs_sm90
from scores import MODES
from tolerance import assert_same_bits


def random_qkv(device, q_len, kv_len, heads=(4, 2), dtype=torch.bfloat16, head_dim=64, batch=2):
    return [
        torch.randn(batch, n, h, head_dim, device=device).to(dtype)
        for n, h in ((q_len, heads[0]), (kv_len, heads[1]), (kv_len, heads[1]))
    ]


def settings_of(mode):
    return {"gamma": 0.5, "min_budget": 0, "budget_mode": mode, "return_lse": True}


#: Every op, and those that take shares with them too.
CALLS = [
    *(pytest.param(good_arguments, op, id=op) for op in OPS),
    *(pytest.param(all_tensors, op, id=f"{op}-shares") for op in PIPELINES),
]


def call(op, arguments):
    result = getattr(proxyattn, op)(**arguments)
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize(("make", "op"), CALLS)
def test_never_synchronises(cuda, make, op):
    arguments = make(op, cuda)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(op, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def wait_a_while():
    """Work on the current stream that lasts some milliseconds."""
    torch.cuda._sleep(20_000_000)


@pytest.mark.parametrize(("make", "op"), CALLS)
def test_runs_on_the_current_stream(cuda, make, op):
    """The inputs are written late on a side stream: the op waits there, and nowhere else."""
    arguments = make(op, cuda)
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    for value in tensors.values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, device=cuda).abs())
    want = call(op, arguments)
    late = {name: torch.zeros_like(value) for name, value in tensors.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        wait_a_while()
        for name, value in tensors.items():
            late[name].copy_(value)
        got = call(op, {**arguments, **late})
    stream.synchronize()
    for first, second in zip(got, want, strict=True):
        assert_same_bits(first, second)


def test_two_streams_at_a_time(cuda):
    """No scratch is shared between calls."""
    inputs = [random_qkv(cuda, 1000, 1000) for _ in range(2)]
    want = [proxyattn.proxy_attention(*x, **settings_of("top_p")) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        got = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                got.append(proxyattn.proxy_attention(*x, **settings_of("top_p")))
        torch.cuda.synchronize()
        for result, expected in zip(got, want, strict=True):
            for first, second in zip(result, expected, strict=True):
                assert_same_bits(first, second)


def test_second_device(cuda):
    """The tensors' device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tensors = random_qkv("cuda:0", 700, 700)
    want = proxyattn.proxy_attention(*tensors, **settings_of("top_p"))
    assert torch.cuda.current_device() == 0
    moved = [x.to("cuda:1") for x in tensors]
    got = proxyattn.proxy_attention(*moved, **settings_of("top_p"))
    assert torch.cuda.current_device() == 0
    want += proxyattn.choose_blocks(*tensors[:2], gamma=0.5, min_budget=0)
    got += proxyattn.choose_blocks(*moved[:2], gamma=0.5, min_budget=0)
    assert torch.cuda.current_device() == 0
    for first, second in zip(got, want, strict=True):
        assert first.device == torch.device("cuda:1")
        assert_same_bits(first.cpu(), second.cpu())


def capture(function):
    """(graph, what the function returned while it was captured)"""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("limit", [None, "small"])
def test_graph_replays_with_new_inputs(cuda, mode, head_dim, limit):
    """Replays pick new blocks for new inputs, again and again, and leave nothing behind."""
    tensors = random_qkv(cuda, 1000, 1300, head_dim=head_dim)
    settings = settings_of(mode)
    if limit == "small":
        arguments = {**dict(zip("qkv", tensors, strict=True)), **settings}
        settings["max_workspace_bytes"] = smallest_workspace(arguments)
    graph, outputs = capture(lambda: proxyattn.proxy_attention(*tensors, **settings))
    for spread in (1.0, 3.0, 0.1, 1.0):
        for tensor, new in zip(
            tensors, random_qkv(cuda, 1000, 1300, head_dim=head_dim), strict=True
        ):
            tensor.copy_(new * spread)
        want = [x.clone() for x in proxyattn.proxy_attention(*tensors, **settings)]
        for _ in range(2):
            for output in outputs:
                output.fill_(float("nan"))
            graph.replay()
            for first, second in zip(outputs, want, strict=True):
                assert_same_bits(first, second)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [None, "small"])
def test_graph_of_lists_replays_with_new_inputs(cuda, mode, limit):
    """New shares are taken too: they are read on the device."""
    q, k, _ = random_qkv(cuda, 1000, 1300, (8, 2))
    settings = {"gamma": 0.5, "min_budget": 0, "budget_mode": mode}
    if mode == "top_p":
        settings["shares"] = torch.rand(2, 8, device=cuda)
    if limit == "small":
        arguments = {"q": q, "k": k, **settings}
        settings["max_workspace_bytes"] = smallest_workspace(arguments, op="choose_blocks")
    graph, outputs = capture(lambda: proxyattn.choose_blocks(q, k, **settings))
    for spread in (1.0, 3.0, 0.1):
        q.normal_().mul_(spread)
        k.normal_()
        if mode == "top_p":
            settings["shares"].uniform_()
        want = proxyattn.choose_blocks(q, k, **settings)
        for output in outputs:
            output.fill_(-7)
        graph.replay()
        for first, second in zip(outputs, want, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(("make", "op"), CALLS)
def test_graph_of_one_op(cuda, make, op):
    arguments = make(op, cuda)
    want = [x.clone() for x in call(op, arguments)]
    graph, outputs = capture(lambda: call(op, arguments))
    for _ in range(3):
        for output in outputs:
            output.zero_()
        graph.replay()
        for first, second in zip(outputs, want, strict=True):
            assert_same_bits(first, second)


def test_two_graphs_on_two_streams(cuda):
    inputs = [random_qkv(cuda, 900, 900) for _ in range(2)]
    want = [proxyattn.proxy_attention(*x, **settings_of("top_p")) for x in inputs]
    captured = [
        capture(lambda x=x: proxyattn.proxy_attention(*x, **settings_of("top_p"))) for x in inputs
    ]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream, (graph, _) in zip(streams, captured, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, outputs), expected in zip(captured, want, strict=True):
        for first, second in zip(outputs, expected, strict=True):
            assert_same_bits(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_fifty_runs_give_the_same_bits(cuda, dtype, head_dim):
    """A race would show sooner or later."""
    tensors = random_qkv(cuda, 1500, 2000, (8, 2), dtype, head_dim)
    want = proxyattn.proxy_attention(*tensors, **settings_of("top_p"))
    for _ in range(50):
        got = proxyattn.proxy_attention(*tensors, **settings_of("top_p"))
        for first, second in zip(got, want, strict=True):
            assert_same_bits(first, second)


@pytest.mark.parametrize(("make", "op"), CALLS)
def test_writes_nothing_but_its_outputs(cuda, make, op):
    """Outputs are put between two guards, by leaving a hole of their size in fresh memory."""
    arguments = make(op, cuda)
    likes = call(op, arguments)
    for place, like in enumerate(likes):
        if like.numel() == 0:
            continue
        granule = 512  # the allocator hands out multiples of it
        nbytes = -(-like.numel() * like.element_size() // granule) * granule
        pool = torch.cuda.MemPool()
        with torch.cuda.use_mem_pool(pool):
            guards = [
                torch.full((size,), 0xA5, dtype=torch.uint8, device=cuda)
                for size in (64 * granule, nbytes, 64 * granule)
            ]
            hole = guards.pop(1)
            start = hole.data_ptr()
            assert [guards[0].data_ptr(), guards[1].data_ptr()] == [
                start - 64 * granule,
                start + nbytes,
            ]
            del hole
            outputs = call(op, arguments)
        torch.cuda.synchronize()
        assert start in [x.data_ptr() for x in outputs], f"output {place} is elsewhere"
        for guard in guards:
            assert (guard == 0xA5).all(), "wrote outside of an output"
        for got, want in zip(outputs, likes, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("mode", MODES)
def test_scratch_and_outputs_may_hold_anything(cuda, mode):
    """Fresh memory is full of NaNs, in bytes of ones: no result depends on it."""
    tensors = random_qkv(cuda, 777, 1111, (7, 1))
    want = [x.clone() for x in proxyattn.proxy_attention(*tensors, **settings_of(mode))]
    torch.cuda.synchronize()
    for byte in (0xFF, 0x00, 0x7F):
        torch.cuda.empty_cache()
        filled = [
            torch.full((size,), byte, dtype=torch.uint8, device=cuda)
            for size in [1 << 20] * 16 + [1 << 23] * 16
        ]
        del filled
        got = proxyattn.proxy_attention(*tensors, **settings_of(mode))
        for first, second in zip(got, want, strict=True):
            assert_same_bits(first, second)


def test_lists_out_of_range_are_empty_blocks(cuda):
    """A GPU can't refuse them without waiting; it must not follow them."""
    q, k, v = random_qkv(cuda, 128, 512)
    good = torch.tensor([3, 0, 5, 1], dtype=torch.int32, device=cuda).expand(2, 4, 2, 4)
    counts = torch.full((2, 4, 2), 4, dtype=torch.int32, device=cuda)
    wild = torch.tensor(
        [3, -1, 0, 2**31 - 1, 8, 5, -(2**31), 1], dtype=torch.int32, device=cuda
    ).expand(2, 4, 2, 8)
    want = proxyattn.block_sparse_attention(q, k, v, good, counts, 64, return_lse=True)
    got = proxyattn.block_sparse_attention(q, k, v, wild, counts * 2, 64, return_lse=True)
    for first, second in zip(got, want, strict=True):
        torch.testing.assert_close(first, second, atol=1e-2, rtol=0)
    # A count beyond the list is cut to it, a negative one is none.
    got, _ = proxyattn.block_sparse_attention(q, k, v, good, counts * 1000, 64)
    assert_same_bits(got, want[0])
    got, lse = proxyattn.block_sparse_attention(q, k, v, good, -counts, 64, return_lse=True)
    assert (got == 0).all() and (lse == -torch.inf).all()


FAMILY_RUN = """
import sys, torch, proxyattn
torch.manual_seed(0)
out = {}
for head_dim in (64, 128, 256):
    for dtype in (torch.bfloat16, torch.float16):
        for block_size in (64, 128):
            q, k, v = (
                torch.randn(2, n, h, head_dim).to(dtype).cuda()
                for n, h in ((900, 8), (1300, 2), (1300, 2))
            )
            rows, blocks = -(-900 // block_size), -(-1300 // block_size)
            lists = torch.rand(2, 2, rows, blocks).argsort(-1).int().cuda()
            counts = torch.randint(0, blocks + 1, (2, 8, rows)).int().cuda()
            name = f"{head_dim} {dtype} {block_size}"
            out[name] = [
                x.cpu() for x in proxyattn.block_sparse_attention(
                    q, k, v, lists, counts, block_size, return_lse=True)
            ]
            out["score " + name] = [
                x.cpu() for x in proxyattn.score_blocks(
                    q[:, :, :4], k, 900, 1300, 1, block_size, with_mass=True)
            ]
            out["shares " + name] = [proxyattn.estimate_shares(q, k, block_size).cpu()]
torch.save(out, sys.argv[1])
"""


def run_family(family, path):
    environment = {**os.environ, "PROXYATTN_FAMILY": family}
    subprocess.run([sys.executable, "-c", FAMILY_RUN, str(path)], env=environment, check=True)
    return torch.load(path)


def test_kernel_families_agree(cuda, tmp_path):
    """The family for every device against the newest, which runs by default."""
    portable = run_family("sm80", tmp_path / "sm80.pt")
    default = run_family("", tmp_path / "default.pt")
    assert default.keys() == portable.keys() and len(default) == 36
    for case, results in default.items():
        for first, second in zip(results, portable[case], strict=True):
            finite = first.isfinite()
            assert torch.equal(finite, second.isfinite()), case
            first, second = first[finite], second[finite]
            unit = max(torch.finfo(first.dtype).eps, 1e-5)
            torch.testing.assert_close(first, second, atol=2 * unit * first.abs().max(), rtol=0)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_complete_rankings_are_dense_attention(cuda, head_dim):
    """Heads whose budget is every visible block read them in the order of dense attention, where a
    kernel can: there the bits are the same."""
    tensors = random_qkv(cuda, 1000, 1100, (8, 2), head_dim=head_dim)
    settings = {"block_size": 128, "return_lse": True}
    forced = {"gamma": 0.0, "min_budget": 0, "num_local_blocks": 9}
    sparse = proxyattn.proxy_attention(*tensors, **settings, **forced)
    dense = proxyattn.proxy_attention(*tensors, **settings, gamma=1.0)
    for first, second in zip(sparse, dense, strict=True):
        if runs_sm90(cuda):
            assert_same_bits(first, second)
        else:
            torch.testing.assert_close(first, second, atol=1e-2, rtol=0)


@pytest.mark.parametrize("block_size", [64, 128])
def test_more_keys_than_the_cache_holds(cuda, block_size, monkeypatch):
    """Key heads are worked on in sections; here 8 MB a head, and sections cross batch entries."""
    q, k, v = random_qkv(cuda, 300, 16_384, (6, 3), head_dim=128)
    rows, blocks = -(-300 // block_size), 16_384 // block_size
    lists = torch.rand(2, 3, rows, blocks, device=cuda).argsort(-1).int()
    counts = torch.randint(0, blocks // 4, (2, 6, rows), device=cuda).int()
    settings = {"block_size": block_size, "causal": False, "return_lse": True}
    out, lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, **settings)
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm80")
    want, want_lse = proxyattn.block_sparse_attention(q, k, v, lists, counts, **settings)
    torch.testing.assert_close(out, want, atol=4e-3, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=0)


def documented_bytes(n, q_heads, proxies, head_dim, mode, stride=4, block=64):
    """What the README says that proxy_attention needs for one prompt beyond its output."""
    num_blocks = -(-n // block)
    token = proxies * head_dim * 2
    row = (12 if mode == "top_p" else 8) * proxies * num_blocks
    row += 4 * q_heads + block // stride * token
    rows = min(num_blocks, (512 << 20) // row)
    spare = 1 << 20  # tiles that pieces end in, and alignment
    return -(-n // stride) * token + rows * row + (288 << 20) + spare


@pytest.mark.parametrize("n", [16_384, 131_072, pytest.param(1_048_576, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("much_memory")
def test_memory_is_what_the_readme_says(cuda, mode, n):
    q, k, v = (
        torch.randn(1, n, heads, 128, dtype=torch.bfloat16, device=cuda) for heads in (16, 8, 8)
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = proxyattn.proxy_attention(q, k, v, gamma=0.5, budget_mode=mode)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
    assert peak <= documented_bytes(n, 16, 8, 128, mode)
    assert peak <= 1.5 * 2**30


def test_unknown_family_is_refused(cuda, monkeypatch):
    monkeypatch.setenv("PROXYATTN_FAMILY", "sm12")
    with pytest.raises(ValueError) as error:
        call("block_sparse_attention", good_arguments("block_sparse_attention", cuda))
    families = list(
        dict.fromkeys(
            config["family"]
            for config in proxyattn.supported_configs()
            if config["device"] == "cuda"
        )
    )
    assert str(error.value) == (
        f"block_sparse_attention: PROXYATTN_FAMILY must be one of {', '.join(families)}, got sm12"
    )


def test_configs_name_every_kernel(cuda):
    rows = [x for x in proxyattn.supported_configs() if x["device"] == "cuda"]
    assert json.loads(json.dumps(rows)) == rows
    have = {(x["head_dim"], x["dtype"]) for x in rows if x["family"] == "sm80"}
    assert have == {(d, t) for d in (64, 128, 256) for t in ("bfloat16", "float16")}


def test_too_many_key_blocks_are_refused(cuda):
    """The selector sorts one row inside a thread block: 16,384 blocks at most."""
    peak = torch.zeros(1, 1, 1, 16_385, device=cuda)
    budgets = torch.ones(1, 1, dtype=torch.int32, device=cuda)
    with pytest.raises(ValueError, match="at most 16384 key blocks on a GPU, got 16385"):
        proxyattn.select_blocks(
            peak, None, budgets, 1, 64 * 16_385, 1, causal=False, budget_mode="last_block"
        )
