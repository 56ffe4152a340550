"""The public functions: the ops of ``torch.ops.proxyattn`` with defaults and documentation.

Tensors are ``q [B, M, Hq, D]`` and ``k, v [B, N, Hkv, D]`` with the last dimension contiguous and
any other strides; Hkv divides Hq; D is 64, 128 or 256, on CPUs any multiple of 8 up to 256.
bfloat16 and float16 everywhere, float32 on CPUs too. Causal attention is aligned bottom-right:
query i stands at position N - M + i.

All functions raise ValueError for a wrong value or shape, TypeError for a wrong dtype or device,
RuntimeError if CUDA fails, if an input requires grad while grad mode is on, or if one carries a
forward-mode tangent: there is no derivative.
The method is that of ProxyAttn, arXiv 2509.24745; ``pooling="mean"`` and ``budget_mode="top_p"``
are this package's.
"""

import torch
from torch import Tensor

#: Tokens per block. Finer blocks find more for the same time, see bench/RESULTS.md.
DEFAULT_BLOCK_SIZE = 64
#: Share of its attention that every head keeps, by budget mode.
DEFAULT_GAMMA = {"top_p": 0.9, "last_block": 0.95}
#: Tokens that every head attends to at least, by budget mode.
DEFAULT_MIN_BUDGET = {"top_p": 512, "last_block": 2048}
#: Rankings that a layer has at least, where its query heads allow as many: one proxy for many heads
#: would stand for heads that differ.
MIN_PROXY_HEADS = 4


def default_proxy_heads(q_heads: int, kv_heads: int) -> int:
    """Proxy heads that ``num_proxy_heads=None`` stands for.

    ``kv_heads`` if that is 4 or more, else its smallest multiple that divides ``q_heads`` and is at
    least 4, else ``q_heads``.
    """
    if kv_heads >= MIN_PROXY_HEADS:
        return kv_heads
    # Head counts that don't fit together are reported by the op, in one place.
    multiples = range(kv_heads, q_heads, kv_heads) if kv_heads > 0 else ()
    for count in multiples:  # a loop that torch.compile of torch 2.6 can follow
        if count >= MIN_PROXY_HEADS and q_heads % count == 0:
            return count
    return q_heads


def _proxy_heads(num_proxy_heads: int | None, q: Tensor, k: Tensor) -> int:
    if num_proxy_heads is not None:
        return num_proxy_heads
    # A wrong rank is reported by the op.
    return default_proxy_heads(q.shape[-2], k.shape[-2]) if min(q.dim(), k.dim()) > 1 else 1


def _default_of(mode_defaults: dict, value, budget_mode: str):
    if value is not None:
        return value
    # An unknown mode is reported by the op.
    return mode_defaults.get(budget_mode, 0)


def pool_heads(
    q: Tensor,
    k: Tensor,
    num_proxy_heads: int | None = None,
    stride: int = 4,
    pooling: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Pools the heads of each proxy over windows of ``stride`` tokens.

    Proxy c of g stands for the query heads ``[c * Hq / g, (c + 1) * Hq / g)`` and the kv heads that
    they read: several, or one that it shares with other proxies. Means are taken in fp32 and
    rounded once.

    Args:
        q: ``[B, M, Hq, D]``, after the rotary embedding.
        k: ``[B, N, Hkv, D]``, after the rotary embedding.
        num_proxy_heads: g, divides Hkv or is a multiple of it that divides Hq; None means
            :func:`default_proxy_heads`.
        stride: 1, 2, 4 or 8 tokens; windows of queries are counted from query 0, those of keys from
            key 0, and the last may be short.
        pooling: ``"mean"``: over the window's tokens that exist, or ``"first"``, the paper's: the
            window's first token.

    Returns:
        ``q_proxy [B, ceil(M / stride), g, D]`` and ``k_proxy [B, ceil(N / stride), gk, D]`` with
        ``gk = min(g, Hkv)``, in the dtype of q.
    """
    proxy_heads = _proxy_heads(num_proxy_heads, q, k)
    return torch.ops.proxyattn.pool_heads(q, k, proxy_heads, stride, pooling)


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
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores every key block for every query block by the proxy heads' attention.

    Windows are masked by the positions of their first tokens.

    Args:
        q_proxy: ``[B, ceil(q_len / stride), g, D]``, from :func:`pool_heads`.
        k_proxy: ``[B, ceil(kv_len / stride), gk, D]``; gk divides g, and proxy c is scored with key
            proxy ``c * gk // g``.
        q_len: M, query tokens before pooling.
        kv_len: N, key tokens before pooling.
        stride: tokens of a window.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query, bottom-right aligned; needs ``q_len <= kv_len``.
        scale: factor of the logits, 1 / sqrt(D) by default.
        with_mass: compute mass too, which ``budget_mode="top_p"`` needs.
        window: as in :func:`block_sparse_attention`. Of each query block the key blocks that hold
            no key which one of its queries sees don't exist here; those at the window's edge count
            whole.

    Returns:
        ``peak`` fp32 ``[B, g, ceil(M / block_size), ceil(N / block_size)]``, the largest natural
        log-probability among the pairs of windows of a block, -inf where none is visible; and
        ``mass`` of the same shape, the mean probability that the query windows put on the block, or
        an empty tensor of shape ``[0]`` unless asked for.
    """
    return torch.ops.proxyattn.score_blocks(
        q_proxy, k_proxy, q_len, kv_len, stride, block_size, causal, scale, with_mass, window
    )


def estimate_budgets(
    q: Tensor,
    k: Tensor,
    gamma: float = DEFAULT_GAMMA["last_block"],
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Counts the key blocks that hold a share gamma of each head's attention in its last queries.

    What ``budget_mode="last_block"`` goes by.

    Args:
        q: ``[B, M, Hq, D]``; the last ``min(block_size, M)`` queries are used.
        k: ``[B, N, Hkv, D]``.
        gamma: share of the attention mass; ``>= 1`` gives all blocks, ``<= 0`` gives 1.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query, bottom-right aligned.
        scale: factor of the logits, 1 / sqrt(D) by default.
        window: as in :func:`score_blocks`.

    Returns:
        int32 ``[B, Hq]``, between 1 and ``ceil(N / block_size)``; 0 when M or N is 0.
    """
    return torch.ops.proxyattn.estimate_budgets(q, k, gamma, block_size, causal, scale, window)


def estimate_shares(
    q: Tensor,
    k: Tensor,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    scale: float | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    window: int | None = None,
) -> Tensor:
    """Says how much of each head's attention in its last queries the forced blocks hold.

    What ``budget_mode="top_p"`` goes by: a head that lives on its sinks and neighbours needs little
    else.

    Args:
        q: ``[B, M, Hq, D]``; the last ``min(block_size, M)`` queries are used.
        k: ``[B, N, Hkv, D]``.
        block_size: 64 or 128 tokens.
        causal: mask keys behind the query, bottom-right aligned.
        scale: factor of the logits, 1 / sqrt(D) by default.
        num_sink_blocks: first key blocks that are always taken.
        num_local_blocks: key blocks at the queries' own positions and before them that are always
            taken; causal only.
        window: as in :func:`score_blocks`; sink blocks that it hides are not taken.

    Returns:
        fp32 ``[B, Hq]``, between 0 and 1; NaN when M or N is 0, or where the head's attention is.
    """
    return torch.ops.proxyattn.estimate_shares(
        q, k, block_size, causal, scale, num_sink_blocks, num_local_blocks, window
    )


def select_blocks(
    peak: Tensor,
    mass: Tensor | None,
    needs: Tensor,
    q_len: int,
    kv_len: int,
    num_heads: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
    causal: bool = True,
    budget_mode: str = "top_p",
    gamma: float | None = None,
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Ranks the visible key blocks of every query block and says how many each head takes.

    Args:
        peak: fp32 ``[B, g, Mb, Nb]``, from :func:`score_blocks`.
        mass: fp32 ``[B, g, Mb, Nb]`` for ``"top_p"``; not looked at, and may be None, for
            ``"last_block"``.
        needs: fp32 shares ``[B, Hq]`` from :func:`estimate_shares` for ``"top_p"``, int32 budgets
            ``[B, Hq]`` from :func:`estimate_budgets` for ``"last_block"``.
        q_len: M, query tokens.
        kv_len: N, key tokens.
        num_heads: Hq; g divides it.
        block_size: 64 or 128 tokens.
        causal: as the scores were computed.
        budget_mode: ``"top_p"``: in every query block as many blocks as hold what the head needs of
            the proxy's attention there; or ``"last_block"``, the paper's: the head's budget in all.
        gamma: with ``"top_p"`` the share of its attention that a head keeps: the forced blocks hold
            its share of that, and the part ``(gamma - share) / (1 - share)`` of the row's mass
            outside them is needed beside it. ``>= 1`` takes all. None means the mode's default,
            see :data:`DEFAULT_GAMMA`; ``"last_block"`` has it in the budgets.
        min_budget: tokens that every head takes at least, if visible; None means 512 for
            ``"top_p"`` and 2048 for ``"last_block"``.
        num_sink_blocks: first key blocks that are always taken.
        num_local_blocks: key blocks at the query block's own position and before it that are
            always taken; causal only.
        window: as the scores were computed. Visible blocks are then those that hold a key which one
            of the queries sees, and of the sink blocks those among them are taken.

    Returns:
        ``indices`` int32 ``[B, g, Mb, Nb]``, the ranking, forced blocks first, -1 after the last
        visible block; and ``counts`` int32 ``[B, Hq, Mb]``, how many of its group's ranking each
        head takes.
    """
    return torch.ops.proxyattn.select_blocks(
        peak,
        mass,
        needs,
        q_len,
        kv_len,
        num_heads,
        block_size,
        causal,
        budget_mode,
        _default_of(DEFAULT_GAMMA, gamma, budget_mode),
        _default_of(DEFAULT_MIN_BUDGET, min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
        window,
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
    window: int | None = None,
    sink_logits: Tensor | None = None,
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
        window: at least 1, causal only: a query sees so many keys, the last at its own position, as
            transformers' ``sliding_window`` has it. None: all up to there.
        sink_logits: fp32 ``[Hq]``, the logit of a column without a value that joins each row's
            softmax, gpt-oss's ``s_aux``; ``scale`` is not applied to it. None: none.

    Returns:
        ``out [B, M, Hq, D]`` in the dtype of q, and ``lse`` fp32 ``[B, Hq, M]``, natural log, or an
        empty tensor of shape ``[0]`` unless asked for; it includes the sink. A query that sees
        nothing gets 0, and -inf or its head's sink logit.
    """
    return torch.ops.proxyattn.block_sparse_attention(
        q, k, v, indices, counts, block_size, causal, scale, return_lse, window, sink_logits
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


def choose_blocks(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    gamma: float | None = None,
    stride: int = 4,
    pooling: str = "mean",
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_proxy_heads: int | None = None,
    budget_mode: str = "top_p",
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    shares: Tensor | None = None,
    window: int | None = None,
    max_workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses the key blocks of a prompt: pools, scores, estimates and selects in one call.

    The lists are what :func:`proxy_attention` attends to with the same arguments, in the form that
    :func:`block_sparse_attention` takes.

    Args:
        q: ``[B, M, Hq, D]``, after the rotary embedding.
        k: ``[B, N, Hkv, D]``, after the rotary embedding.
        causal, scale, ..., max_workspace_bytes: as in :func:`proxy_attention`.

    Returns:
        ``indices`` int32 ``[B, g, Mb, Nb]`` and ``counts`` int32 ``[B, Hq, Mb]``, as in
        :func:`select_blocks`.
    """
    return torch.ops.proxyattn.choose_blocks(
        q,
        k,
        causal,
        scale,
        _default_of(DEFAULT_GAMMA, gamma, budget_mode),
        stride,
        pooling,
        block_size,
        _proxy_heads(num_proxy_heads, q, k),
        budget_mode,
        _default_of(DEFAULT_MIN_BUDGET, min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
        shares,
        max_workspace_bytes,
        window,
    )


def proxy_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    gamma: float | None = None,
    stride: int = 4,
    pooling: str = "mean",
    block_size: int = DEFAULT_BLOCK_SIZE,
    num_proxy_heads: int | None = None,
    budget_mode: str = "top_p",
    min_budget: int | None = None,
    num_sink_blocks: int = 1,
    num_local_blocks: int = 1,
    shares: Tensor | None = None,
    window: int | None = None,
    sink_logits: Tensor | None = None,
    return_lse: bool = False,
    max_workspace_bytes: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse attention of a prompt: pools, scores, estimates, selects and attends in one call.

    Args:
        q: ``[B, M, Hq, D]``, after the rotary embedding.
        k: ``[B, N, Hkv, D]``, after the rotary embedding.
        v: ``[B, N, Hkv, D]``.
        causal: mask keys behind the query, bottom-right aligned; needs ``M <= N``.
        scale: factor of the logits, 1 / sqrt(D) by default.
        gamma: share of its attention that each head keeps; higher reads more blocks. ``>= 1`` is
            dense attention. None means the budget mode's default, see :data:`DEFAULT_GAMMA`.
        stride: 1, 2, 4 or 8; the estimate takes windows of so many tokens.
        pooling: ``"mean"`` or ``"first"`` (the paper's), what stands for a window, see
            :func:`pool_heads`.
        block_size: 64 or 128 tokens.
        num_proxy_heads: rankings per layer; divides Hkv or is a multiple of it that divides Hq.
            None means :func:`default_proxy_heads`.
        budget_mode: ``"top_p"`` or ``"last_block"`` (the paper's), see :func:`select_blocks`.
        min_budget: tokens that every head takes at least, if visible; None means 512 for
            ``"top_p"`` and 2048 for ``"last_block"``.
        num_sink_blocks: first key blocks that are always taken.
        num_local_blocks: latest key blocks that are always taken.
        shares: fp32 ``[B, Hq]``, what :func:`estimate_shares` gives; ``"top_p"`` only. None: they
            are estimated from this call. With shares given, what a query block reads depends on
            its own queries and the keys that it sees alone, so that the chunks of a prompt, cut at
            multiples of ``block_size``, read what the whole prompt would.
        window: at least 1, causal only: a query sees so many keys, the last at its own position.
            Blocks that the window hides don't exist for the estimate either; with ``gamma >= 1``
            all that it touches are read, and no others. On any GPU the portable kernels choose
            them.
        sink_logits: fp32 ``[Hq]``, see :func:`block_sparse_attention`; the estimate goes without.
        return_lse: return the log-sum-exp too.
        max_workspace_bytes: cap on the scratch memory; long sequences are then worked through in
            pieces, with the same result bit for bit. None lets it choose.

    Returns:
        ``out [B, M, Hq, D]`` in the dtype of q; with ``return_lse`` also ``lse`` fp32
        ``[B, Hq, M]``, natural log.
    """
    out, lse = torch.ops.proxyattn.proxy_attention(
        q,
        k,
        v,
        causal,
        scale,
        _default_of(DEFAULT_GAMMA, gamma, budget_mode),
        stride,
        pooling,
        block_size,
        _proxy_heads(num_proxy_heads, q, k),
        budget_mode,
        _default_of(DEFAULT_MIN_BUDGET, min_budget, budget_mode),
        num_sink_blocks,
        num_local_blocks,
        shares,
        return_lse,
        max_workspace_bytes,
        window,
        sink_logits,
    )
    return (out, lse) if return_lse else out
