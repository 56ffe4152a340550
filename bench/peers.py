"""The competitors. Each builder takes the inputs and returns a call that computes attention once
and returns ``[1, N, Hq, D]``; it raises where the competitor can't run, which is then reported.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import proxyattn
import torch
from peers_inputs import Chosen, ExactRows, Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

Call = Callable[[], Tensor]

OURS = "proxyattn"


@dataclass
class Entry:
    """One competitor in one case."""

    build: Callable[[], Callable[[], object]]
    flops: float = 0.0
    exact: ExactRows | None = None  # what its output is checked against
    note: str = ""


def heads_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[1, H, N, D]``, as torch's attention takes them."""
    return tuple(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))


# ---- ours


def ours_dense(inputs: Inputs, causal: bool) -> Call:
    return lambda: proxyattn.proxy_attention(
        inputs.q, inputs.k, inputs.v, causal=causal, gamma=1.0, block_size=128
    )


def ours_sparse(inputs: Inputs, chosen: Chosen) -> Call:
    indices, counts = chosen.lists(with_diagonal=True, compact=True)
    return ours_over_lists(inputs, indices, counts, chosen.block_size)


def ours_over_lists(inputs: Inputs, indices: Tensor, counts: Tensor, block_size: int) -> Call:
    return lambda: proxyattn.block_sparse_attention(
        inputs.q, inputs.k, inputs.v, indices, counts, block_size
    )[0]


# ---- torch's own


def torch_sdpa(backend: SDPBackend | None, inputs: Inputs, causal: bool) -> Call:
    """torch's attention, by the one backend or by its own choice."""
    q, k, v = heads_first(inputs)
    shared = q.shape[1] != k.shape[1]

    def call(length: int | None = None) -> Tensor:
        part = slice(0, length)
        args = (q[:, :, part], k[:, :, part], v[:, :, part])
        if backend is None:
            out = scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=shared)
        else:
            with sdpa_kernel(backend):
                out = scaled_dot_product_attention(*args, is_causal=causal, enable_gqa=shared)
        return out.transpose(1, 2)

    try:
        call(length=min(256, q.shape[2]))
    except RuntimeError:
        if not shared:
            raise
        # A backend that can't share keys and values among heads gets them repeated, untimed.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        shared = False
        call(length=min(256, q.shape[2]))
    return call


def torch_masked(inputs: Inputs, chosen: Chosen) -> Call:
    """torch's attention with a token mask made of the blocks; for short inputs on a CPU."""
    q, k, v = heads_first(inputs)
    length, size = q.shape[2], chosen.block_size
    tokens = chosen.mask.repeat_interleave(size, 1).repeat_interleave(size, 2)
    mask = (tokens[:, :length, :length]).tril()[None]
    shared = q.shape[1] != k.shape[1]
    return lambda: scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=shared
    ).transpose(1, 2)


@functools.cache
def compiled_flex():
    import torch._dynamo
    from torch.nn.attention.flex_attention import flex_attention

    # One compilation for each length and block size; the default limit is 8.
    config = torch._dynamo.config
    setattr(
        config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", 64
    )
    return torch.compile(flex_attention, dynamic=False)


def _causal_mask_mod(batch, head, q_idx, kv_idx):
    return kv_idx <= q_idx


def torch_flex(inputs: Inputs, chosen: Chosen) -> Call:
    from torch.nn.attention.flex_attention import BlockMask

    q, k, v = heads_first(inputs)
    length, size = q.shape[2], chosen.block_size
    full_indices, full_counts = chosen.lists(with_diagonal=False, compact=False)
    masked_indices, masked_counts = diagonal_lists(chosen, width=full_indices.shape[-1])
    options = {"compute_q_blocks": False, "seq_lengths": (length, length)}
    known = inspect.signature(BlockMask.from_kv_blocks).parameters
    block_mask = BlockMask.from_kv_blocks(
        masked_counts,
        masked_indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=size,
        mask_mod=_causal_mask_mod,
        **{name: value for name, value in options.items() if name in known},
    )
    # Tiles must divide the blocks; those of 128 are left to its own choice.
    tiles = {"BLOCK_M": size, "BLOCK_N": size} if size < 128 else None
    flex = compiled_flex()
    shared = q.shape[1] != k.shape[1]
    return lambda: flex(
        q, k, v, block_mask=block_mask, enable_gqa=shared, kernel_options=tiles
    ).transpose(1, 2)


def diagonal_lists(chosen: Chosen, width: int) -> tuple[Tensor, Tensor]:
    """Lists that hold the diagonal block alone: indices ``[1, Hq, Mb, width]``, counts."""
    heads, rows, _ = chosen.mask.shape
    indices = torch.zeros((1, heads, rows, width), dtype=torch.int32, device=chosen.mask.device)
    indices[..., 0] = torch.arange(rows, dtype=torch.int32, device=chosen.mask.device)
    return indices, torch.ones_like(indices[..., 0])


# ---- FlashAttention-4


def flash4_dense(inputs: Inputs, causal: bool) -> Call:
    from flash_attn.cute.interface import flash_attn_func

    return lambda: first(flash_attn_func(inputs.q, inputs.k, inputs.v, causal=causal))


@functools.cache
def flash4_causal_mod():
    import cutlass.cute as cute

    @cute.jit
    def causal_mod(batch, head, q_idx, kv_idx, seqlen_info, aux):
        return kv_idx <= q_idx

    return causal_mod


def flash4_sparse(inputs: Inputs, chosen: Chosen) -> Call:
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    full_indices, full_counts = chosen.lists(with_diagonal=False, compact=True)
    masked_indices, masked_counts = diagonal_lists(chosen, width=1)
    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=masked_counts,
        mask_block_idx=masked_indices,
        full_block_cnt=full_counts,
        full_block_idx=full_indices,
        block_size=(chosen.block_size, chosen.block_size),
    )
    causal_mod = flash4_causal_mod()
    return lambda: first(
        flash_attn_func(
            inputs.q, inputs.k, inputs.v, mask_mod=causal_mod, block_sparse_tensors=tensors
        )
    )


def first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def flash4_window(inputs: Inputs, window: int) -> Call:
    from flash_attn.cute.interface import flash_attn_func

    seen = {"causal": True, "window_size": (window - 1, 0)}
    return lambda: first(flash_attn_func(inputs.q, inputs.k, inputs.v, **seen))


def flash4_chunk(inputs: Inputs, begin: int) -> Call:
    from flash_attn.cute.interface import flash_attn_func

    q = inputs.q[:, begin:].contiguous()
    return lambda: first(flash_attn_func(q, inputs.k, inputs.v, causal=True))


def torch_window(inputs: Inputs, window: int) -> Call:
    """torch's attention with a token mask; for short inputs on a CPU."""
    q, k, v = heads_first(inputs)
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    mask = ones.tril() & ones.triu(1 - window)
    return lambda: scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(
        1, 2
    )


# ---- who competes where


def competitors(device: torch.device) -> set[str]:
    """Names of all but ours."""
    return {*dense_builders(device), *sparse_builders(device)}


def dense_builders(device: torch.device) -> dict[str, Callable[[Inputs, bool], Call]]:
    """Dense competitors but ours: name to ``builder(inputs, causal)``."""
    if device.type == "cpu":
        return {"torch SDPA": functools.partial(torch_sdpa, None)}
    return {
        "FlashAttention-2 (torch)": functools.partial(torch_sdpa, SDPBackend.FLASH_ATTENTION),
        "cuDNN (torch)": functools.partial(torch_sdpa, SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-4": flash4_dense,
    }


def sparse_builders(device: torch.device) -> dict[str, Callable[[Inputs, Chosen], Call]]:
    """Block-sparse competitors but ours: name to ``builder(inputs, chosen)``."""
    if device.type == "cpu":
        return {"torch SDPA, masked": torch_masked}
    return {"FlashAttention-4": flash4_sparse, "flex_attention": torch_flex}


def chunk_builders(device: torch.device) -> dict[str, Callable[[Inputs, int], Call]]:
    """Dense competitors over the queries from one on: name to ``builder(inputs, begin)``."""
    return {} if device.type == "cpu" else {"FlashAttention-4": flash4_chunk}


def window_builders(device: torch.device) -> dict[str, Callable[[Inputs, int], Call]]:
    """Competitors with a sliding window: name to ``builder(inputs, window)``."""
    if device.type == "cpu":
        return {"torch SDPA, masked": torch_window}
    return {"FlashAttention-4": flash4_window}
