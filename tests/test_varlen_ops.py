"""The varlen ops as torch sees them: schemas, fake kernels, autograd, torch.compile."""

import shutil

import proxyattn
import pytest
import torch
from arguments import message_of
from packs import OPS, WITH_OUT, arguments_of, random_pack
from tolerance import assert_same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

PLACES = "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
PAGES = "Tensor? block_table, Tensor? seqused_k, "
SETTINGS = (
    "bool causal, float? scale, float gamma, int stride, str pooling, int block_size, "
    "int num_proxy_heads, str budget_mode, int min_budget, int num_sink_blocks, "
    "int num_local_blocks, Tensor? shares, "
)
SCHEMAS = {
    "block_sparse_attention_varlen": f"(Tensor q, Tensor k, Tensor v, {PLACES}Tensor indices, "
    f"Tensor counts, {PAGES}int block_size, bool causal, float? scale, bool return_lse, "
    "Tensor(a!)? out, int? window=None, Tensor? sink_logits=None) -> (Tensor out, Tensor lse)",
    "choose_blocks_varlen": f"(Tensor q, Tensor k, {PLACES}{PAGES}{SETTINGS}"
    "int? max_workspace_bytes, int? window=None) -> (Tensor indices, Tensor counts)",
    "proxy_attention_varlen": f"(Tensor q, Tensor k, Tensor v, {PLACES}{PAGES}{SETTINGS}"
    "bool return_lse, int? max_workspace_bytes, Tensor(a!)? out, int? window=None, "
    "Tensor? sink_logits=None) -> (Tensor out, Tensor lse)",
}
LENGTHS = [(130, 130), (0, 70), (70, 300)]


def some_pack(device, page=None, lengths=LENGTHS):
    return random_pack(device, lengths, page=page, spare=0)


def leaves(result):
    return list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("op", OPS)
def test_schema(op):
    found = getattr(torch.ops.proxyattn, op)
    assert found.overloads() == ["default"]
    assert str(found.default._schema) == f"proxyattn::{op}{SCHEMAS[op]}"
    assert callable(getattr(proxyattn, op)) and op in proxyattn.__all__


def op_arguments(op, device):
    """Positional arguments of the op: packed and paged, with and without optional tensors."""
    variants = []
    # Lengths of a token more than whole blocks, so that no query block is left without a sequence.
    lengths = [(129, 129), (1, 70), (65, 300)]
    for page, out, lse in ((None, False, False), (32, True, True), (None, True, False)):
        pack = some_pack(device, page, lengths)
        given = arguments_of(op, pack)
        for name in ("block_table", "seqused_k"):
            given.setdefault(name, None)
        # With a window blocks are chosen on CPUs only.
        has_window = page is None and (device == "cpu" or op == "block_sparse_attention_varlen")
        settings = {
            "window": 70 if has_window else None,
            "sink_logits": torch.rand(4, device=device) if lse else None,
            "causal": page is None,
            "scale": None if page is None else 0.3,
            "gamma": 0.5,
            "stride": 4,
            "pooling": "mean",
            "block_size": 64,
            "num_proxy_heads": 2,
            "budget_mode": "top_p",
            "min_budget": 0,
            "num_sink_blocks": 1,
            "num_local_blocks": 1,
            "shares": torch.rand(3, 4, device=device) if out else None,
            "return_lse": lse,
            "max_workspace_bytes": None,
            "out": torch.full_like(given["q"], 7) if out else None,
        }
        names = [x.name for x in getattr(torch.ops.proxyattn, op).default._schema.arguments]
        given = {**settings, **given}
        variants.append(tuple(given[name] for name in names))
    return variants


@pytest.mark.parametrize("op", OPS)
def test_opcheck(device, op):
    for arguments in op_arguments(op, device):
        torch.library.opcheck(getattr(torch.ops.proxyattn, op).default, arguments)


@pytest.mark.parametrize("op", OPS)
def test_fake_outputs_are_like_real_ones(device, op):
    function = getattr(torch.ops.proxyattn, op)
    for arguments in op_arguments(op, device):
        real = leaves(function(*arguments))
        with FakeTensorMode() as mode:
            fake = leaves(
                function(
                    *(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments)
                )
            )
        on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
        meta = leaves(function(*on_meta))
        for like in (fake, meta):
            for a, b in zip(like, real, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("op", OPS)
def test_inputs_stay(device, op):
    function = getattr(torch.ops.proxyattn, op)
    for arguments in op_arguments(op, device):
        names = [x.name for x in function.default._schema.arguments]
        tensors = {
            name: x
            for name, x in zip(names, arguments, strict=True)
            if isinstance(x, torch.Tensor) and name != "out"
        }
        before = {name: x.clone() for name, x in tensors.items()}
        versions = {name: x._version for name, x in tensors.items()}
        function(*arguments)
        for name, x in tensors.items():
            assert_same_bits(x, before[name], name)
            assert x._version == versions[name]


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_counts_as_written(device, op):
    """Whoever kept it for a backward is told."""
    arguments = arguments_of(op, some_pack(device))
    out = torch.zeros_like(arguments["q"])
    before = out._version
    getattr(proxyattn, op)(**arguments, out=out)
    assert out._version == before + 1
    factor = torch.ones_like(out, requires_grad=True)
    product = (factor * out).sum()
    with torch.no_grad():
        getattr(proxyattn, op)(**arguments, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        getattr(proxyattn, op)(**arguments, out=torch.zeros_like(out))


@pytest.mark.parametrize("op", OPS)
def test_refuses_to_be_differentiated(device, op):
    arguments = arguments_of(op, some_pack(device))
    if op in WITH_OUT:
        arguments["out"] = torch.zeros_like(arguments["q"])
    for name in [n for n in ("q", "k", "v", "out") if n in arguments]:
        changed = {**arguments, name: arguments[name].detach().clone().requires_grad_()}
        with pytest.raises(RuntimeError) as error:
            getattr(proxyattn, op)(**changed)
        assert message_of(error) == (
            f"{op}: {name} must not require grad, there is no backward; call it under "
            "torch.no_grad() or detach the tensor"
        )


# ---- torch.compile


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def whole(q, k, v, places, out):
    result, lse = proxyattn.proxy_attention_varlen(
        q * 2, k, v, **places, gamma=0.5, min_budget=0, return_lse=True, out=out
    )
    return result + 1, lse


def stages(q, k, v, places, out):
    lists = proxyattn.choose_blocks_varlen(q * 2, k, **places, gamma=0.5, min_budget=0)
    indices, counts = lists
    return proxyattn.block_sparse_attention_varlen(
        q * 2, k, v, **places, indices=indices, counts=counts, return_lse=True, out=out
    )


def assert_compiled_is_eager(compiled, function, pack, with_out, close=False):
    tensors = list(pack.tensors.values())
    outs = [torch.full_like(tensors[0], 7) if with_out else None for _ in range(2)]
    got = compiled(*tensors, pack.places, outs[0])
    want = function(*tensors, pack.places, outs[1])
    pairs = [*zip(got, want, strict=True), outs] if with_out else zip(got, want, strict=True)
    for first, second in pairs:
        if close:
            torch.testing.assert_close(first, second, atol=1e-2, rtol=1e-2)
        else:
            assert_same_bits(first.contiguous(), second.contiguous())


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("with_out", [False, True], ids=["new", "out"])
@pytest.mark.parametrize("function", [whole, stages])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(device, function, backend, with_out):
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for page in (None, 16):
        assert_compiled_is_eager(compiled, function, some_pack(device, page), with_out)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("function", [whole, stages])
def test_compile_once_for_all_lengths(device, function):
    """First with as many sequences as make no size that of another thing, or torch takes the two
    for one."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    lengths = [*LENGTHS, *LENGTHS, (20, 90)]
    assert_compiled_is_eager(compiled, function, some_pack(device, 16, lengths), False)
    with torch.compiler.set_stance("fail_on_recompile"):
        for more in ([(200, 300), (65, 700)], [(2, 90), (3, 40), (301, 500), (70, 80)]):
            assert_compiled_is_eager(compiled, function, some_pack(device, 16, more), False)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("with_out", [False, True], ids=["new", "out"])
def test_compile_inductor(device, with_out):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    compiled = torch.compile(whole, fullgraph=True)
    assert_compiled_is_eager(compiled, whole, some_pack(device, 64), with_out, close=True)
