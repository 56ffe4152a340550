"""Training-free sparse prefill attention for long-context language models.

``proxy_attention(q, k, v)`` is the whole method; the functions beside it are its stages. All of
them are also ops, ``torch.ops.proxyattn.*``.
"""

import torch  # first: the extension links against the libraries that it loads

try:
    from proxyattn import _C
except ImportError as error:
    raise ImportError(
        "proxyattn: the compiled extension proxyattn._C could not be loaded "
        f"({error}). Build it for this Python and torch with: "
        "pip install --no-build-isolation ."
    ) from error

from proxyattn import _meta
from proxyattn._config import show_config, supported_configs
from proxyattn._packed_checks import check_sequences
from proxyattn.ops import (
    block_sparse_attention,
    check_block_lists,
    choose_blocks,
    estimate_budgets,
    estimate_shares,
    pool_heads,
    proxy_attention,
    score_blocks,
    select_blocks,
)
from proxyattn.varlen import (
    block_sparse_attention_varlen,
    choose_blocks_varlen,
    proxy_attention_varlen,
)

__version__ = _C.version

__all__ = [
    "block_sparse_attention",
    "block_sparse_attention_varlen",
    "check_block_lists",
    "check_sequences",
    "choose_blocks",
    "choose_blocks_varlen",
    "estimate_budgets",
    "estimate_shares",
    "pool_heads",
    "proxy_attention",
    "proxy_attention_varlen",
    "score_blocks",
    "select_blocks",
    "show_config",
    "supported_configs",
]
