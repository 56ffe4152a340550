"""Calls that are refused for more than a single argument: devices, gradients, lists, workspace."""

import proxyattn
import pytest
import torch
import torch.autograd.forward_ad as forward_mode
from arguments import (
    OPS,
    PIPELINES,
    all_tensors,
    good_arguments,
    message_of,
    smallest_workspace,
)


@pytest.mark.parametrize("op", OPS)
def test_good_arguments_are_good(device, op):
    """Or the other tests would prove little."""
    for arguments in (good_arguments(op, device), all_tensors(op, device)):
        result = getattr(proxyattn, op)(**arguments)
        for tensor in result if isinstance(result, tuple) else [result]:
            assert tensor.device.type == device


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("first", [True, False], ids=["first", "others"])
def test_meta_among_real_tensors(device, op, first):
    """Either way round: the tensor that is elsewhere is named, and nothing is computed."""
    arguments = all_tensors(op, device)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    real = str(arguments[names[0]].device)
    moved = names[:1] if first else names[1:]
    for name in moved:
        changed = {**arguments, name: arguments[name].to("meta")}
        with pytest.raises(TypeError) as error:
            getattr(proxyattn, op)(**changed)
        places = ("meta", real) if first else (real, "meta")
        blamed = r"\w+" if first else name
        text = f"{op}: {blamed} must be on the device of {names[0]}, {places[0]}, got {places[1]}"
        assert error.match(f"^{text}$".replace("(", r"\("))


@pytest.mark.parametrize("op", OPS)
def test_cpu_among_cuda_tensors(cuda, op):
    arguments = all_tensors(op, cuda)
    names = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    for name in names[1:]:
        with pytest.raises(TypeError) as error:
            getattr(proxyattn, op)(**{**arguments, name: arguments[name].cpu()})
        assert message_of(error) == (
            f"{op}: {name} must be on the device of {names[0]}, {arguments[names[0]].device}, "
            "got cpu"
        )


def floats(arguments):
    """The names of those that could have a derivative."""
    return [
        name
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    ]


@pytest.mark.parametrize("op", OPS)
def test_refuses_to_be_differentiated(device, op):
    arguments = all_tensors(op, device)
    for name in floats(arguments):
        changed = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(RuntimeError) as error:
            getattr(proxyattn, op)(**changed)
        assert message_of(error) == (
            f"{op}: {name} must not require grad, there is no backward; call it under "
            "torch.no_grad() or detach the tensor"
        )
        with torch.no_grad():
            getattr(proxyattn, op)(**changed)
        with torch.inference_mode():
            getattr(proxyattn, op)(**arguments)


@pytest.mark.parametrize("op", OPS)
def test_refuses_to_be_differentiated_forward(device, op):
    """With or without grad mode, which is the other mode's."""
    arguments = all_tensors(op, device)
    for name in floats(arguments):
        value = arguments[name]

        def call(x, name=name):
            return getattr(proxyattn, op)(**{**arguments, name: x})

        message = (
            f"{op}: {name} must not carry a tangent, there is no forward-mode derivative; detach "
            "the tensor"
        )
        with pytest.raises(RuntimeError) as error:
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
        assert message_of(error) == message
        with forward_mode.dual_level():
            dual = forward_mode.make_dual(value, torch.ones_like(value))
            with torch.no_grad(), pytest.raises(RuntimeError) as error:
                call(dual)
            assert message_of(error) == message
            call(dual.detach())


def test_constants_of_a_differentiated_function(device):
    """What carries no tangent passes through."""
    arguments = good_arguments("proxy_attention", device)
    want = proxyattn.proxy_attention(**arguments)

    def scaled(factor):
        return proxyattn.proxy_attention(**arguments) * factor

    one = torch.ones((), dtype=torch.bfloat16, device=device)
    out, tangent = torch.func.jvp(scaled, (one,), (one,))
    assert torch.equal(out, want) and torch.equal(tangent, want)


def bad_lists():
    """(indices or counts, its new value at the first place, message), the CPU op refuses these."""
    capacity = "counts must be in [0, 4], the lists' capacity, got"
    blocks = "indices must name key blocks in [0, 4), got"
    return [
        ("counts", -1, f"{capacity} -1"),
        ("counts", 5, f"{capacity} 5"),
        ("counts", 2**31 - 1, f"{capacity} 2147483647"),
        ("indices", -1, f"{blocks} -1"),
        ("indices", 4, f"{blocks} 4"),
        ("indices", -(2**31), f"{blocks} -2147483648"),
    ]


def attention_with_lists(device):
    arguments = good_arguments("block_sparse_attention", device)
    arguments["indices"] = torch.arange(4, dtype=torch.int32, device=device).repeat(2, 2, 2, 1)
    arguments["counts"] = torch.full((2, 4, 2), 2, dtype=torch.int32, device=device)
    return arguments


@pytest.mark.parametrize(("name", "value", "message"), bad_lists())
def test_lists_out_of_range_on_the_cpu(name, value, message):
    arguments = attention_with_lists("cpu")
    arguments[name].view(-1)[-1 if name == "counts" else 0] = value
    with pytest.raises(ValueError) as error:
        proxyattn.block_sparse_attention(**arguments)
    assert message_of(error) == f"block_sparse_attention: {message}"


def checked_calls(arguments):
    """Every way to attend over lists that PROXYATTN_CHECK reaches."""
    values = list(arguments.values())
    op = torch.ops.proxyattn.block_sparse_attention
    return [
        lambda: proxyattn.block_sparse_attention(**arguments),
        lambda: op(*values, True, None, False),
        lambda: torch.compile(op, backend="aot_eager")(*values, True, None, False),
    ]


@pytest.mark.parametrize(("name", "value", "message"), bad_lists())
def test_check_block_lists_out_of_range(device, monkeypatch, name, value, message):
    arguments = attention_with_lists(device)
    arguments[name].view(-1)[0] = value
    with pytest.raises(ValueError) as error:
        proxyattn.check_block_lists(arguments["indices"], arguments["counts"], 200, 64)
    assert message_of(error) == f"block_sparse_attention: {message}"
    monkeypatch.setenv("PROXYATTN_CHECK", "1")
    for call in checked_calls(arguments):
        with pytest.raises(ValueError) as error:
            call()
        # Older compilers of torch go on about the graph.
        assert message_of(error).splitlines()[0] == f"block_sparse_attention: {message}"


def test_check_block_lists_duplicates(device, monkeypatch):
    arguments = attention_with_lists(device)
    indices, counts = arguments["indices"], arguments["counts"]
    indices[1, 1, 0, 2] = 0  # repeats the first, past the count of two
    proxyattn.check_block_lists(indices, counts, 200, 64)
    counts[1, 3, 0] = 3  # now a head of that list reads it
    with pytest.raises(ValueError) as error:
        proxyattn.check_block_lists(indices, counts, 200, 64)
    assert message_of(error) == (
        "block_sparse_attention: indices must be unique in each list, got 0 twice"
    )
    monkeypatch.setenv("PROXYATTN_CHECK", "1")
    for call in checked_calls(arguments):
        with pytest.raises(ValueError, match="unique in each list"):
            call()
    for off in ("0", ""):
        monkeypatch.setenv("PROXYATTN_CHECK", off)
        proxyattn.block_sparse_attention(**arguments)


def test_check_block_lists_takes_what_select_blocks_gives(device, monkeypatch):
    monkeypatch.setenv("PROXYATTN_CHECK", "1")
    arguments = good_arguments("select_blocks", device)
    indices, counts = proxyattn.select_blocks(**arguments)
    attention = good_arguments("block_sparse_attention", device)
    proxyattn.block_sparse_attention(**{**attention, "indices": indices, "counts": counts})
    empty = torch.zeros(0, 2, 2, 4, dtype=torch.int32, device=device)
    proxyattn.check_block_lists(empty, empty[:, :, :, 0].repeat(1, 2, 1), 200, 64)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"kv_len": -1}, ValueError, "kv_len must be at least 0, got kv_len=-1"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got block_size=0"),
        ({"counts": torch.zeros(2, 4, 2)}, TypeError, "counts must have dtype int32, got float32"),
        (
            {"indices": torch.zeros(2, 3, 2, 4, dtype=torch.int32)},
            ValueError,
            "indices must hold lists for a number of heads that divides q_heads, got "
            "indices.size(1)=3, q_heads=4",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_check_block_lists_of_wrong_arguments(changes, kind, message):
    lists = attention_with_lists("cpu")
    arguments = {"indices": lists["indices"], "counts": lists["counts"], "kv_len": 200}
    with pytest.raises(kind) as error:
        proxyattn.check_block_lists(**{**arguments, **changes})
    assert message_of(error) == f"block_sparse_attention: {message}"


@pytest.mark.parametrize("change", [{"indices": "dim"}, {"counts": "dim"}, {"counts": "heads"}])
def test_check_leaves_shapes_to_the_same_words(device, monkeypatch, change):
    """With the check on, a wrong shape reads as it does without it."""
    (name, what), *_ = change.items()
    arguments = attention_with_lists(device)
    arguments[name] = arguments[name][0] if what == "dim" else arguments[name][:1]
    messages = []
    for check in ("0", "1"):
        monkeypatch.setenv("PROXYATTN_CHECK", check)
        with pytest.raises(ValueError) as error:
            proxyattn.block_sparse_attention(**arguments)
        messages.append(message_of(error))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("op", PIPELINES)
def test_workspace_too_small(device, op):
    arguments = good_arguments(op, device)
    needed = smallest_workspace(arguments, op=op)
    assert smallest_workspace(arguments, limit=needed - 1, op=op) == needed
    assert smallest_workspace(arguments, limit=-1, op=op) == needed
    getattr(proxyattn, op)(**arguments, max_workspace_bytes=needed)


def test_wrong_python_types_are_refused(device):
    """By torch's schema check, which names the argument."""
    arguments = good_arguments("pool_heads", device)
    for name, value in [("q", "text"), ("stride", 2.5), ("num_proxy_heads", "2"), ("pooling", 1)]:
        with pytest.raises((RuntimeError, TypeError), match=name):
            torch.ops.proxyattn.pool_heads(**{"pooling": "mean", **arguments, name: value})
