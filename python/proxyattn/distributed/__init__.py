"""Prefill on more than one GPU, on ``torch.distributed`` alone.

    from proxyattn.distributed import context_parallel_attention, shard

    out = context_parallel_attention(shard(q), shard(k), shard(v))

Context parallel: sequences lie on the ranks of a group, and every query block reads what it would
read in one process. Tensor parallel needs nothing of this: a rank that has some of the heads calls
:func:`proxyattn.proxy_attention` on them, with its part of ``num_proxy_heads``.
"""

from proxyattn.distributed.attention import context_parallel_attention
from proxyattn.distributed.shards import shard, unshard

__all__ = ["context_parallel_attention", "shard", "unshard"]
