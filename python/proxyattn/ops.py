"""The public functions: the ops of ``torch.ops.proxyattn`` with defaults and documentation.

Tensors are ``q [B, M, Hq, D]`` and ``k, v [B, N, Hkv, D]`` with the last dimension contiguous and
any other strides; Hkv divides Hq; D is 64, 128 or 256. bfloat16 and float16 everywhere, float32 on
CPUs too. Causal attention is aligned bottom-right: query i stands at position N - M + i.

All functions raise ValueError for a wrong value or shape, TypeError for a wrong dtype or device,
RuntimeError if CUDA fails, if an input requires grad while grad mode is on, or if one carries a
forward-mode tangent: there is no derivative.
The method is that of ProxyAttn, arXiv 2509.24745; ``budget_mode="coverage"`` is this package's.
"""

import torch
from torch import Tensor

#: Tokens per block. Finer blocks find more for the same time, see bench/RESULTS.md.
DEFAULT_BLOCK_SIZE = 64
#: Tokens that every head attends to at least, by budget mode.
DEFAULT_MIN_BUDGET = {"last_block": 2048, "coverage": 1024}


def _min_budget(min_budget: int | None, budget_mode: str) -> int:
    if min_budget is not None:
        return min_budget
    # An unknown mode is reported by the op, in one place.
    return DEFAULT_MIN_BUDGET.get(budget_mode, 0)


def pool_heads(
    q: Tensor, k: Tensor, num_proxy_heads: int | None = None, stride: int = 4
) -> tuple[Tensor, Tensor]:
    """Pools the heads of each proxy group, at the first token of every stride window.

    Proxy group c holds kv heads ``[c * Hkv / g, (c + 1) * Hkv / g)`` and the query heads that read
    them. Means are taken in fp32 and rounded once.

    Args:
        q: ``[B, M, Hq, D]``, after the rotary embedding.
        k: ``[B, N, Hkv, D]``, after the rotary embedding.
        num_proxy_heads: g, divides Hkv; None means Hkv.
        stride: 1, 2, 4 or 8 tokens.

    Returns:
        ``q_proxy [B, ceil(M / stride), g, D]`` and ``k_proxy [B, ceil(N / stride), g, D]``, in the
        dtype of q.
    """
    if num_proxy_heads is None:
        num_proxy_heads = k.shape[2] if k.dim() == 4 else 1
    return torch.ops.proxyattn.pool_heads(q, k, num_proxy_heads, stride)


def score_blocks(
    q_proxy: Tensor,
    k_proxy: Tensor,
    q_len: int,
    kv_len: int,
    stride: int = 4,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    scale: float | None = None,
    with_mass: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scores every key block for every query block by the proxy heads' attention.

    Args:
        q_proxy: ``[B, ceil(q_len / stride), g, D]``, from :func:`pool_heads`.
        k_proxy: ``[B, ceil(kv_len / stride), g, D]``.
        q_len: M, query tokens before sampling.
        kv_len: N, key tokens before sampling.
        stride: distance in tokens of the sampled tokens.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query, bottom-right aligned; needs ``q_len <= kv_len``.
        scale: factor of the logits, 1 / sqrt(D) by default.
        with_mass: compute mass too, which ``budget_mode="coverage"`` needs.

    Returns:
        ``peak`` fp32 ``[B, g, ceil(M / block_size), ceil(N / block_size)]``, the largest natural
        log-probability among the sampled pairs of a block, -inf where none is visible; and ``mass``
        of the same shape, the mean probability that the sampled queries put on the block, or an
        empty tensor of shape ``[0]`` unless asked for.
    """
    return torch.ops.proxyattn.score_blocks(
        q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale, with_mass
    )


def estimate_budgets(
    q: Tensor,
    k: Tensor,
    gamma: float = 0.95,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Counts the key blocks that hold a share gamma of each head's attention in its last queries.

    Args:
        q: ``[B, M, Hq, D]``; the last ``min(block_size, M)`` queries are used.
        k: ``[B, N, Hkv, D]``.
        gamma: share of the attention mass; ``>= 1`` gives all blocks, ``<= 0`` gives 1.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query, bottom-right aligned.
        scale: factor of the logits, 1 / sqrt(D) by default.

    Returns:
        int32 ``[B, Hq]``, between 1 and ``ceil(N / block_size)``; 0 when M or N is 0.
    """
    return torch.ops.proxyattn.estimate_budgets(q, k, gamma, block_size, causal, scale)


def select_blocks(
    peak: Tensor,
    mass: Tensor | None,
    budgets: Tensor,
    q_len: int,
    kv_len: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    budget_mode: str = "last_block",
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Ranks the visible key blocks of every query block and says how many each head takes.

    Args:
        peak: fp32 ``[B, g, Mb, Nb]``, from :func:`score_blocks`.
        mass: fp32 ``[B, g, Mb, Nb]``; None or empty will do for ``"last_block"``.
        budgets: int32 ``[B, Hq]``, from :func:`estimate_budgets`.
        q_len: M, query tokens.
        kv_len: N, key tokens.
        block_size: 64 or 128 tokens.
        causal: as the scores were computed.
        budget_mode: ``"last_block"``, the paper's: every query block takes the head's budget; or
            ``"coverage"``: as many blocks as cover the share of proxy mass that the budget covers
            in the last query block.
        min_budget: tokens that every head takes at least, if visible; None means 2048 for
            ``"last_block"`` and 1024 for ``"coverage"``.
        num_sink_blocks: first key blocks that are always taken.
        num_local_blocks: key blocks at the query block's own position and before it that are
            always taken; causal only.

    Returns:
        ``indices`` int32 ``[B, g, Mb, Nb]``, the ranking, forced blocks first, -1 after the last
        visible block; and ``counts`` int32 ``[B, Hq, Mb]``, how many of its group's ranking each
        head takes.
    """
    if mass is None:
        mass = torch.empty(0, dtype=torch.float32, device=peak.device)
    return torch.ops.proxyattn.select_blocks(
        peak,
        mass,
        budgets,
        q_len,
        kv_len,
        block_size,
        causal,
        budget_mode,
        _min_budget(min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
    )


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Exact attention of each query over the key blocks listed for its query block and head.

    Lists come from :func:`select_blocks` or from any selector of your own. Entries of a list are
    unique and in any order; entries past the count are never read. The CPU refuses an index
    outside the key blocks; a GPU reads it as an empty block, since asking would cost a
    synchronisation. With ``PROXYATTN_CHECK=1`` in the environment every call, of the op too, begins
    with :func:`check_block_lists`.

    Args:
        q: ``[B, M, Hq, D]``.
        k: ``[B, N, Hkv, D]``.
        v: ``[B, N, Hkv, D]``.
        indices: int32 ``[B, L, Mb, C]``; L divides Hq and Hq / L consecutive heads share a list.
        counts: int32 ``[B, Hq, Mb]``, entries that each head reads.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query inside the blocks, bottom-right aligned.
        scale: factor of the logits, 1 / sqrt(D) by default.
        return_lse: compute the log-sum-exp too.

    Returns:
        ``out [B, M, Hq, D]`` in the dtype of q, and ``lse`` fp32 ``[B, Hq, M]``, natural log, or an
        empty tensor of shape ``[0]`` unless asked for. A query that sees nothing gets 0 and -inf.
    """
    return torch.ops.proxyattn.block_sparse_attention(
        q, k, v, indices, counts, block_size, causal, scale, return_lse
    )


def check_block_lists(
    indices: Tensor, counts: Tensor, kv_len: int, block_size: int = DEFAULT_BLOCK_SIZE
) -> None:
    """Raises ValueError unless the lists are fit for :func:`block_sparse_attention`.

    Counts must lie in ``[0, C]``, and the entries that they cover must be unique and name key
    blocks in ``[0, ceil(kv_len / block_size))``. For debugging: it waits for the device and copies
    the lists to the host.

    Args:
        indices: int32 ``[B, L, Mb, C]``.
        counts: int32 ``[B, Hq, Mb]``.
        kv_len: N, key tokens.
        block_size: 64 or 128 tokens.
    """
    torch.ops.proxyattn._check_block_lists(indices, counts, kv_len, block_size)


def proxy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    gamma: float = 0.95,
    stride: int = 4,
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_proxy_heads: int | None = None,
    budget_mode: str = "last_block",
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    return_lse: bool = False,
    max_workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention of a prompt: pools, scores, budgets, selects and attends in one call.

    Args:
        q: ``[B, M, Hq, D]``, after the rotary embedding.
        k: ``[B, N, Hkv, D]``, after the rotary embedding.
        v: ``[B, N, Hkv, D]``.
        causal: mask keys behind the query, bottom-right aligned; needs ``M <= N``.
        scale: factor of the logits, 1 / sqrt(D) by default.
        gamma: share of its attention that each head keeps in the last query block; higher reads
            more blocks. ``>= 1`` is dense attention.
        stride: 1, 2, 4 or 8; every stride-th token takes part in the estimate.
        block_size: 64 or 128 tokens.
        num_proxy_heads: rankings per layer; divides Hkv, None means Hkv.
        budget_mode: ``"last_block"`` (the paper's) or ``"coverage"``, see :func:`select_blocks`.
        min_budget: tokens that every head takes at least, if visible; None means 2048 for
            ``"last_block"`` and 1024 for ``"coverage"``.
        num_sink_blocks: first key blocks that are always taken.
        num_local_blocks: latest key blocks that are always taken.
        return_lse: return the log-sum-exp too.
        max_workspace_bytes: cap on the scratch memory; long sequences are then worked through in
            pieces, with the same result bit for bit. None lets it choose.

    Returns:
        ``out [B, M, Hq, D]`` in the dtype of q; with ``return_lse`` also ``lse`` fp32
        ``[B, Hq, M]``, natural log.
    """
    if num_proxy_heads is None:
        num_proxy_heads = k.shape[2] if k.dim() == 4 else 1
    out, lse = torch.ops.proxyattn.proxy_attention(
        q,
        k,
        v,
        causal,
        scale,
        gamma,
        stride,
        block_size,
        num_proxy_heads,
        budget_mode,
        _min_budget(min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
        return_lse,
        max_workspace_bytes,
    )
    return (out, lse) if return_lse else out
