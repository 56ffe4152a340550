"""Every wrong argument of the varlen ops that the host can see, the type of the error, and its
whole sentence."""

from dataclasses import dataclass

import proxyattn
import pytest
import torch
from arguments import message_of
from packs import OPS, WITH_OUT, arguments_of, random_pack


def good_arguments(op, device, page=None):
    """200 queries, 500 keys or 21 pages, 3 sequences of at most 390 and 900."""
    pack = random_pack(device, [(130, 130), (0, 70), (70, 300)], page=page, spare=0)
    return arguments_of(op, pack)


@dataclass(frozen=True)
class Bad:
    """Arguments to replace, with pages or without: values, or functions of the good one."""

    changes: dict
    error: type
    message: str
    page: int | None = None
    ops: tuple = OPS

    def __str__(self):
        return "-".join([*self.changes, self.message[:50]]).replace(" ", "_")


def table(*shape, dtype=torch.int32):
    return lambda x: x.new_zeros(shape, dtype=dtype)


LISTED = ("block_sparse_attention_varlen",)
CHOOSING = ("choose_blocks_varlen", "proxy_attention_varlen")
BAD_ARGUMENTS = [
    Bad(
        {"q": lambda x: x[None]}, ValueError, "q must have 3 dimensions, got shape [1, 200, 4, 64]"
    ),
    Bad(
        {"k": lambda x: x[None]}, ValueError, "k must have 3 dimensions, got shape [1, 500, 2, 64]"
    ),
    Bad({"k": lambda x: x[0]}, ValueError, "k must have 4 dimensions, got shape [32, 2, 64]", 32),
    Bad(
        {"k": lambda x: x.repeat(1, 1, 2)},
        ValueError,
        "k must have shape [500, 2, 64], got shape [500, 2, 128]",
    ),
    Bad(
        {"v": lambda x: x[:-1]},
        ValueError,
        "v must have shape [500, 2, 64], got shape [499, 2, 64]",
        ops=WITH_OUT,
    ),
    Bad(
        {"v": lambda x: x[:, :16]},
        ValueError,
        "v must have shape [21, 32, 2, 64], got shape [21, 16, 2, 64]",
        32,
        WITH_OUT,
    ),
    Bad({"q": lambda x: x.half()}, TypeError, "k must have the dtype of q, float16, got bfloat16"),
    Bad(
        {"v": lambda x: x.half()},
        TypeError,
        "v must have the dtype of q, bfloat16, got float16",
        ops=WITH_OUT,
    ),
    Bad(
        {"q": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)},
        ValueError,
        "q must be contiguous in its last dimension, got strides [256, 1, 4]",
    ),
    Bad(
        {"k": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)},
        ValueError,
        "k must be contiguous in its last dimension, got strides [4096, 128, 1, 2]",
        32,
    ),
    Bad(
        {"q": lambda x: x[:, :3]},
        ValueError,
        "kv_heads must divide q_heads, got q_heads=3, kv_heads=2",
        ops=CHOOSING,
    ),
    # ---- where sequences are
    Bad(
        {"cu_seqlens_q": lambda x: x.long()},
        TypeError,
        "cu_seqlens_q must have dtype int32, got int64",
    ),
    Bad(
        {"cu_seqlens_q": lambda x: x[None]},
        ValueError,
        "cu_seqlens_q must have 1 dimensions, got shape [1, 4]",
    ),
    Bad(
        {"cu_seqlens_q": table(0)},
        ValueError,
        "cu_seqlens_q must have an element more than there are sequences, got shape [0]",
    ),
    Bad(
        {"cu_seqlens_k": lambda x: x[:-1]},
        ValueError,
        "cu_seqlens_k must have shape [4], got shape [3]",
    ),
    Bad(
        {"cu_seqlens_k": lambda x: x.float()},
        TypeError,
        "cu_seqlens_k must have dtype int32, got float32",
    ),
    Bad(
        {"cu_seqlens_k": None},
        ValueError,
        "one of cu_seqlens_k and block_table must be given, got neither",
    ),
    Bad(
        {"block_table": lambda _: torch.zeros(3, 9, dtype=torch.int32)},
        ValueError,
        "one of cu_seqlens_k and block_table must be given, got both",
    ),
    Bad(
        {"seqused_k": None},
        ValueError,
        "seqused_k must be given with block_table, got None",
        32,
    ),
    Bad(
        {"seqused_k": lambda x: x[:2]},
        ValueError,
        "seqused_k must have shape [3], got shape [2]",
        32,
    ),
    Bad(
        {"seqused_k": lambda x: x.long()},
        TypeError,
        "seqused_k must have dtype int32, got int64",
        32,
    ),
    Bad(
        {"block_table": lambda x: x[:2]},
        ValueError,
        "block_table must have shape [3, 13], got shape [2, 13]",
        32,
    ),
    Bad(
        {"block_table": lambda x: x[0]},
        ValueError,
        "block_table must have 2 dimensions, got shape [13]",
        32,
    ),
    Bad(
        {"block_table": lambda x: x.long()},
        TypeError,
        "block_table must have dtype int32, got int64",
        32,
    ),
    *(
        Bad(
            {
                "k": lambda x, n=n: x[:, :1].repeat(1, n, 1, 1),
                "v": lambda x, n=n: x[:, :1].repeat(1, n, 1, 1),
            },
            ValueError,
            f"pages of k must hold one of 16, 32, 64, 128, 256 tokens, got k.size(1)={n}",
            32,
        )
        for n in (8, 48, 512)
    ),
    *(
        Bad({name: value}, ValueError, f"{name} must be at least 1, got {name}={value}", page)
        for name, value, page in (
            ("max_seqlen_q", 0, None),
            ("max_seqlen_q", -5, 32),
            ("max_seqlen_k", 0, 32),
            ("max_seqlen_k", -1, None),
        )
    ),
    # ---- lists and settings
    Bad(
        {"indices": lambda x: x[None]},
        ValueError,
        "indices must have 3 dimensions, got shape [1, 2, 6, 6]",
        ops=LISTED,
    ),
    Bad(
        {"indices": lambda x: x[:, :5]},
        ValueError,
        "indices must have shape [2, 6, 6], got shape [2, 5, 6]",
        ops=LISTED,
    ),
    Bad(
        {"indices": lambda x: x[:1].expand(3, -1, -1)},
        ValueError,
        "indices must hold lists for a number of heads that divides q_heads, got "
        "indices.size(0)=3, q_heads=4",
        ops=LISTED,
    ),
    Bad(
        {"counts": lambda x: x[:2]},
        ValueError,
        "counts must have shape [4, 6], got shape [2, 6]",
        ops=LISTED,
    ),
    Bad(
        {"counts": lambda x: x.long()},
        TypeError,
        "counts must have dtype int32, got int64",
        ops=LISTED,
    ),
    Bad(
        {"block_size": 96},
        ValueError,
        "block_size must be one of 64, 128, got block_size=96",
    ),
    Bad(
        {"shares": lambda _: torch.zeros(2, 4)},
        ValueError,
        "shares must have shape [3, 4], got shape [2, 4]",
        ops=CHOOSING,
    ),
    Bad(
        {"shares": lambda _: torch.zeros(3, 4), "budget_mode": "last_block"},
        ValueError,
        "shares must be None with budget_mode 'last_block', got a tensor",
        ops=CHOOSING,
    ),
    # ---- out
    *(
        Bad({"out": change}, error, message, ops=WITH_OUT)
        for change, error, message in (
            (
                lambda q: q.new_empty(199, 4, 64),
                ValueError,
                "out must have shape [200, 4, 64], got shape [199, 4, 64]",
            ),
            (
                lambda q: q.new_empty(1, 200, 4, 64),
                ValueError,
                "out must have 3 dimensions, got shape [1, 200, 4, 64]",
            ),
            (
                lambda q: q.new_empty(200, 4, 64, dtype=torch.float16),
                TypeError,
                "out must have the dtype of q, bfloat16, got float16",
            ),
            (
                lambda q: q.new_empty(200, 64, 4).transpose(1, 2),
                ValueError,
                "out must be contiguous in its last dimension, got strides [256, 1, 4]",
            ),
            (
                lambda q: q.new_empty(1, 4, 64).expand(200, -1, -1),
                ValueError,
                "out must have a place of its own for every element, got strides [0, 64, 1]",
            ),
        )
    ),
]


@pytest.mark.parametrize(
    ("op", "bad"),
    [pytest.param(op, bad, id=f"{op}-{bad}") for bad in BAD_ARGUMENTS for op in bad.ops],
)
def test_bad_argument(device, op, bad):
    arguments = good_arguments(op, device, bad.page)
    for name, change in bad.changes.items():
        if name == "v" and op == "choose_blocks_varlen":
            continue
        value = change(arguments.get(name, arguments["q"])) if callable(change) else change
        arguments[name] = value.to(device) if isinstance(value, torch.Tensor) else value
    with pytest.raises(bad.error) as error:
        getattr(proxyattn, op)(**arguments)
    assert message_of(error) == f"{op}: {bad.message}"


@pytest.mark.parametrize("op", WITH_OUT)
def test_out_apart_from_the_inputs(device, op):
    arguments = good_arguments(op, device)
    arguments["q"] = arguments["q"].contiguous()
    same = torch.zeros(700, 2, 64, dtype=torch.bfloat16, device=device)
    arguments["k"], overlapping = same[:500], same.view(-1)[: 200 * 4 * 64].view(200, 4, 64)
    for out, name in ((arguments["q"], "q"), (overlapping, "k")):
        with pytest.raises(ValueError) as error:
            getattr(proxyattn, op)(**arguments, out=out)
        assert message_of(error) == (
            f"{op}: out must not share memory with {name}, got tensors that do"
        )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("page", [None, 32], ids=["packed", "pages"])
def test_every_tensor_is_on_one_device(device, op, page):
    """The one that is elsewhere is named; a meta tensor is elsewhere on every machine."""
    arguments = good_arguments(op, device, page)
    if op in WITH_OUT:
        arguments["out"] = torch.zeros_like(arguments["q"])
    if op in CHOOSING:
        arguments["shares"] = torch.zeros(3, 4, device=device)
    place = arguments["q"].device
    for name, value in list(arguments.items()):
        if isinstance(value, torch.Tensor) and name != "q":
            with pytest.raises(TypeError) as error:
                getattr(proxyattn, op)(**{**arguments, name: value.to("meta")})
            assert message_of(error) == (
                f"{op}: {name} must be on the device of q, {place}, got meta"
            )
