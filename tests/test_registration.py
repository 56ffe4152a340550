"""The ops as torch sees them: schemas, fake kernels, autograd, torch.compile."""

import shutil

import proxyattn
import pytest
import torch
from arguments import OPS, good_arguments
from packs import OPS as VARLEN_OPS
from torch._subclasses.fake_tensor import FakeTensorMode

SCHEMAS = {
    "pool_heads": "(Tensor q, Tensor k, int num_proxy_heads, int stride, str pooling) "
    "-> (Tensor q_proxy, Tensor k_proxy)",
    "score_blocks": "(Tensor q_proxy, Tensor k_proxy, SymInt q_len, SymInt kv_len, int stride, "
    "int block_size, bool causal, float? scale, bool with_mass, int? window=None) "
    "-> (Tensor peak, Tensor mass)",
    "estimate_budgets": "(Tensor q, Tensor k, float gamma, int block_size, bool causal, "
    "float? scale, int? window=None) -> Tensor budgets",
    "estimate_shares": "(Tensor q, Tensor k, int block_size, bool causal, float? scale, "
    "int num_sink_blocks, int num_local_blocks, int? window=None) -> Tensor shares",
    "select_blocks": "(Tensor peak, Tensor? mass, Tensor needs, SymInt q_len, SymInt kv_len, "
    "int num_heads, int block_size, bool causal, str budget_mode, float gamma, int min_budget, "
    "int num_sink_blocks, int num_local_blocks, int? window=None) "
    "-> (Tensor indices, Tensor counts)",
    "block_sparse_attention": "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, "
    "int block_size, bool causal, float? scale, bool return_lse, int? window=None, "
    "Tensor? sink_logits=None) -> (Tensor out, Tensor lse)",
    "choose_blocks": "(Tensor q, Tensor k, bool causal, float? scale, float gamma, int stride, "
    "str pooling, int block_size, int num_proxy_heads, str budget_mode, int min_budget, "
    "int num_sink_blocks, int num_local_blocks, Tensor? shares, int? max_workspace_bytes, "
    "int? window=None) -> (Tensor indices, Tensor counts)",
    "proxy_attention": "(Tensor q, Tensor k, Tensor v, bool causal, float? scale, float gamma, "
    "int stride, str pooling, int block_size, int num_proxy_heads, str budget_mode, "
    "int min_budget, int num_sink_blocks, int num_local_blocks, Tensor? shares, "
    "bool return_lse, int? max_workspace_bytes, int? window=None, Tensor? sink_logits=None) "
    "-> (Tensor out, Tensor lse)",
}


@pytest.mark.parametrize("name", OPS)
def test_schema(name):
    op = getattr(torch.ops.proxyattn, name)
    assert op.overloads() == ["default"]
    assert str(op.default._schema) == f"proxyattn::{name}{SCHEMAS[name]}"


def test_no_op_is_missing_here():
    registered = {
        schema.name.removeprefix("proxyattn::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("proxyattn::") and not schema.name.startswith("proxyattn::_")
    }
    assert registered == {*OPS, *VARLEN_OPS}
    assert set(OPS) == set(SCHEMAS)
    for name in OPS:
        assert callable(getattr(proxyattn, name)) and name in proxyattn.__all__


def variants(name, device):
    """Argument tuples of the op: shapes, layouts, optional outputs on and off, empty inputs."""
    values = list(good_arguments(name, device).values())
    windowed = [70] if device == "cpu" else []  # GPUs choose no blocks inside windows yet
    sinks = torch.ones(4, device=device)
    if name == "pool_heads":
        q, k = values[:2]
        heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
        return [
            (q, k, 2, 4, "mean"),
            (*heads_first, 1, 8, "first"),
            (q[:, 1:], k[:, 1:], 4, 4, "mean"),
            (q[:0], k[:0], 1, 1, "mean"),
            (q[:, :0], k, 2, 2, "first"),
        ]
    if name == "score_blocks":
        q, k = values[:2]
        return [
            (q, k, 100, 200, 4, 64, True, None, False),
            (q, k, 100, 200, 4, 64, True, None, True, *windowed),
            (q, k[:, :, :1], 100, 200, 4, 128, False, 0.5, True),
            (q[:, :1], k, 1, 200, 4, 64, True, None, True),
            (q[:0], k[:0], 100, 200, 4, 64, True, None, True),
        ]
    if name == "estimate_budgets":
        q, k = values[:2]
        return [
            (q, k, 0.9, 64, True, None),
            (q, k, 0.9, 64, True, None, *windowed),
            (q[:, 3:], k, 1.5, 128, False, 0.25),
            (q[:0], k[:0], 0.5, 64, True, None),
        ]
    if name == "estimate_shares":
        q, k = values[:2]
        return [
            (q, k, 64, True, None, 1, 1),
            (q, k, 64, True, None, 1, 1, *windowed),
            (q[:, 3:], k, 128, False, 0.25, 2, 0),
            (q[:0], k[:0], 64, True, None, 1, 1),
        ]
    if name == "select_blocks":
        peak, mass, shares = values[:3]
        budgets = torch.ones_like(shares, dtype=torch.int32)
        lengths = (100, 200, 4)
        return [
            (peak, mass, shares, *lengths, 64, False, "top_p", 0.5, 100, 2, 0),
            (peak, mass, shares, *lengths, 64, True, "top_p", 0.5, 0, 1, 1, *windowed),
            (peak, None, budgets, *lengths, 64, True, "last_block", 0.5, 0, 1, 1),
            (peak, mass, budgets, *lengths, 64, True, "last_block", 0.5, 0, 1, 1),
            (peak[:0], mass[:0], shares[:0], *lengths, 64, True, "top_p", 0.5, 0, 1, 1),
        ]
    if name == "block_sparse_attention":
        tensors = values[:5]
        return [
            (*tensors, 64, True, None, False),
            (*tensors, 64, False, 0.5, True),
            (*tensors, 64, True, None, True, 70, sinks),
            (*tensors, 64, False, None, False, None, sinks),
            (*(x[:0] for x in tensors), 64, True, None, True),
        ]
    tensors = values[:-2]
    none = [x[:0] for x in tensors]
    shares = torch.zeros(2, 4, device=device)
    with_lse, without = ([True], [False]) if name == "proxy_attention" else ([], [])
    dense_in_windows = []
    if name == "proxy_attention":
        settings = (True, None, 1.0, 4, "mean", 64, 2, "top_p", 0, 1, 1, None, True, None)
        dense_in_windows = [(*tensors, *settings, 70, sinks)]
    chosen = (True, None, 0.5, 4, "mean", 64, 2, "top_p", 0, 1, 1, None, *without, None)
    paper = ("first", 128, 1, "last_block", 64, 0, 2, None)
    return [
        (*tensors, *chosen),
        (*tensors, *chosen, *windowed),
        *dense_in_windows,
        (*tensors, True, None, 0.5, 4, "mean", 64, 4, "top_p", 0, 1, 1, shares, *with_lse, None),
        (*tensors, False, 0.5, 0.9, 2, *paper, *with_lse, 10**9),
        (*tensors, True, None, 1.0, 4, "mean", 64, 2, "top_p", 0, 1, 1, None, *with_lse, None),
        (*none, True, None, 0.5, 4, "mean", 64, 2, "top_p", 0, 1, 1, None, *with_lse, None),
    ]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(device, name):
    op = getattr(torch.ops.proxyattn, name).default
    for arguments in variants(name, device):
        torch.library.opcheck(op, arguments)


def leaves(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("name", OPS)
def test_fake_outputs_are_like_real_ones(device, name):
    op = getattr(torch.ops.proxyattn, name)
    for arguments in variants(name, device):
        real = leaves(op(*arguments))
        with FakeTensorMode() as mode:
            fake = leaves(
                op(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments))
            )
        meta = leaves(op(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments)))
        for like in (fake, meta):
            assert len(like) == len(real)
            for a, b in zip(like, real, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert all(a.device == b.device for a, b in zip(fake, real, strict=True))
        assert all(a.is_meta for a in meta)


@pytest.mark.parametrize("name", OPS)
def test_outputs_share_no_memory_and_inputs_stay(device, name):
    op = getattr(torch.ops.proxyattn, name)
    for arguments in variants(name, device):
        tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        outputs = leaves(op(*arguments))
        for tensor, copy in zip(tensors, before, strict=True):
            assert torch.equal(tensor, copy)
        inputs = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
        outs = [x.untyped_storage().data_ptr() for x in outputs if x.numel()]
        assert len(set(outs)) == len(outs) and not inputs & set(outs)


SETTINGS = {"gamma": 0.5, "min_budget": 0}


def whole(q, k, v):
    out, lse = proxyattn.proxy_attention(q * 2, k, v, **SETTINGS, return_lse=True)
    return out + 1, lse


def stages(q, k, v):
    lengths = (q.shape[1], k.shape[1])
    proxies = proxyattn.pool_heads(q * 2, k)
    peak, mass = proxyattn.score_blocks(*proxies, *lengths, with_mass=True)
    shares = proxyattn.estimate_shares(q * 2, k)
    lists = proxyattn.select_blocks(peak, mass, shares, *lengths, q.shape[2], **SETTINGS)
    return proxyattn.block_sparse_attention(q * 2, k, v, *lists, return_lse=True)


def by_budgets(q, k, v):
    lengths = (q.shape[1], k.shape[1])
    proxies = proxyattn.pool_heads(q * 2, k, pooling="first")
    peak, _ = proxyattn.score_blocks(*proxies, *lengths)
    budgets = proxyattn.estimate_budgets(q * 2, k, 0.5)
    lists = proxyattn.select_blocks(
        peak, None, budgets, *lengths, q.shape[2], budget_mode="last_block", min_budget=0
    )
    return proxyattn.block_sparse_attention(q * 2, k, v, *lists, return_lse=True)


def lists_first(q, k, v):
    shares = proxyattn.estimate_shares(q * 2, k).clamp(max=0.5)
    lists = proxyattn.choose_blocks(q * 2, k, **SETTINGS, shares=shares)
    return proxyattn.block_sparse_attention(q * 2, k, v, *lists, return_lse=True)


FUNCTIONS = (whole, stages, by_budgets, lists_first)


def random_qkv(device, q_len, kv_len):
    return [
        torch.randn(2, n, h, 64).to(torch.bfloat16).to(device)
        for n, h in ((q_len, 4), (kv_len, 2), (kv_len, 2))
    ]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(device, function, backend):
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    tensors = random_qkv(device, 200, 300)
    for got, want in zip(compiled(*tensors), function(*tensors), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_once_for_all_lengths(device, function):
    """Of two blocks and more; sizes of one are special to torch."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(*random_qkv(device, 150, 300))
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in [(200, 300), (65, 700), (301, 301)]:
            tensors = random_qkv(device, *lengths)
            for got, want in zip(compiled(*tensors), function(*tensors), strict=True):
                assert torch.equal(got, want)


@pytest.mark.parametrize("function", [whole, stages])
def test_compile_inductor(device, function):
    """The default backend, which writes code around the ops and may choose the layouts."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    compiled = torch.compile(function, fullgraph=True)
    tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in random_qkv(device, 200, 300)]
    for got, want in zip(compiled(*tensors), function(*tensors), strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_refuses_backward_too(device, function):
    q, k, v = random_qkv(device, 200, 300)
    k.requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="there is no backward"):
        compiled(q, k, v)
    with torch.no_grad():
        compiled(q, k, v)


@pytest.mark.parametrize("name", OPS)
def test_outputs_do_not_require_grad(device, name):
    arguments = good_arguments(name, device)
    for output in leaves(getattr(proxyattn, name)(**arguments)):
        assert not output.requires_grad and output.grad_fn is None
