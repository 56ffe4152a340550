"""What :func:`proxyattn.estimate_shares` says of a sharded sequence, computed where its keys are.

The last queries go to every rank, each takes the log-sum-exp of their logits over its own keys,
forced blocks and others apart, and few numbers of each rank make the shares on all of them. No key
travels for it, so that this runs while the first are gathered.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from proxyattn import ops
from proxyattn.distributed.collectives import gathered
from proxyattn.distributed.layout import Chunk
from proxyattn.distributed.pages import Tokens
from proxyattn.settings import Settings

#: Keys that one query block goes through alone. There is only one, and a GPU wants more to do.
_KEYS_AT_A_TIME = 8192


class LastQueries:
    """The last queries of the sequences, as many as a block has: collective."""

    def __init__(
        self,
        q: Tensor,
        tokens: Tokens,
        settings: Settings,
        causal: bool,
        scale: float,
        group: dist.ProcessGroup,
    ):
        self._rank, self._group = dist.get_rank(group), group
        self._tokens, self._causal, self._scale = tokens, causal, scale
        block = settings.block_size
        total = tokens.total
        self._begin = total - min(block, tokens.shardings[-1].total)
        visible = -(-total // block)
        # The forced blocks of these queries, as the selector has them.
        local = visible
        if causal and settings.num_local_blocks > 0:
            local = max(0, self._begin // block - (settings.num_local_blocks - 1))
        self._local_begin = local * block
        self._sink_end = min(settings.num_sink_blocks, local) * block
        self._q = self._collect(q)

    def _collect(self, q: Tensor) -> Tensor:
        """[B, L, Hq, D] on every rank. Sums of one value and zeros are exact."""
        batch, _, heads, head_dim = q.shape
        length = self._tokens.total - self._begin
        last = q.new_zeros(batch, length, heads, head_dim, dtype=torch.float32)
        for chunk in self._tokens.queries_on(self._rank):
            skipped = max(0, self._begin - chunk.start)
            if skipped < chunk.length:
                place = chunk.start + skipped - self._begin
                queries = q[:, chunk.local_tokens][:, skipped:]
                last[:, place : place + queries.shape[1]] = queries
        dist.all_reduce(last, group=self._group)
        return last.to(q.dtype)

    def shares(self, k: Tensor) -> Tensor:
        """fp32 ``[B, Hq]``, the same bits on all ranks. ``k`` are the rank's keys; collective."""
        with torch.autocast(k.device.type, enabled=False):  # which would round the logits
            sums = self._sums(k)
        everyone = gathered(sums, self._group)
        forced, total = everyone[:, 0].logsumexp(0), everyone.flatten(0, 1).logsumexp(0)
        return (forced - total).exp().mean(-1).clamp(max=1.0)

    def _sums(self, k: Tensor) -> Tensor:
        """[2, B, Hq, L]: log-sum-exps over the rank's keys in forced blocks, and in the others."""
        batch, length, heads, _ = self._q.shape
        sums = self._q.new_full((2, batch, heads, length), -torch.inf, dtype=torch.float32)
        for chunk in self._tokens.keys_on(self._rank):
            for part in self._parts(chunk):
                kind = 0 if self._is_forced(part) else 1
                keys = k[:, part.local_tokens]
                masked = self._causal and part.start >= self._begin
                lse = self._masked_lse(keys, part.start) if masked else self._lse(keys)
                sums[kind] = torch.logaddexp(sums[kind], lse)
        return sums

    def _is_forced(self, part: Chunk) -> bool:
        return part.start < self._sink_end or part.start >= self._local_begin

    def _parts(self, chunk: Chunk) -> list[Chunk]:
        """Cut where keys become forced or not, and where they begin to be masked."""
        end = chunk.start + chunk.length
        cuts = {self._sink_end, self._local_begin, self._begin}
        places = sorted({chunk.start, end, *(cut for cut in cuts if chunk.start < cut < end)})
        return [
            Chunk(chunk.rank, begin, chunk.offset + begin - chunk.start, after - begin)
            for begin, after in pairwise(places)
        ]

    def _masked_lse(self, keys: Tensor, start: int) -> Tensor:
        """[B, Hq, L] over keys among the queries, of which there are no more than queries."""
        batch, length, heads, _ = self._q.shape
        q = self._q.float().unflatten(2, (keys.shape[2], -1))
        logits = torch.einsum("blhrd,bnhd->bhrln", q, keys.float()) * self._scale
        positions = torch.arange(self._begin, self._begin + length, device=keys.device)
        behind = torch.arange(start, start + keys.shape[1], device=keys.device) > positions[:, None]
        logits = logits.masked_fill(behind, -torch.inf)
        return logits.logsumexp(-1).view(batch, heads, length)

    def _lse(self, keys: Tensor) -> Tensor:
        """[B, Hq, L] over keys that all of the queries see."""
        return torch.stack([self._dense_lse(q, k) for q, k in zip(self._q, keys, strict=True)])

    def _dense_lse(self, q: Tensor, k: Tensor) -> Tensor:
        """[Hq, L] for [L, Hq, D] and [n, Hkv, D], in pieces that run side by side."""
        whole = len(k) // _KEYS_AT_A_TIME * _KEYS_AT_A_TIME
        pieces = [k[:whole].unflatten(0, (-1, _KEYS_AT_A_TIME)), k[None, whole:]]
        found = [
            ops.proxy_attention(
                q.repeat(len(piece), 1, 1, 1),  # no stride of 0, which not all kernels take
                *(piece, piece),
                causal=False,
                scale=self._scale,
                gamma=1.0,  # all blocks: the attention kernel and nothing else
                return_lse=True,
            )[1]
            for piece in pieces
            if piece.numel() > 0
        ]
        return torch.cat(found).logsumexp(0)
