"""Padded rows and packed prompts as the sequences of one packed call."""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from proxyattn.hf._causal import FIRST_SEQUENCE, num_tokens


class Places(NamedTuple):
    """Tokens of a batch, in the order in which a packed call has them."""

    rows: Tensor  # int64 [T]
    columns: Tensor  # int64 [T]

    def take(self, x: Tensor) -> Tensor:
        """``[B, N, H, D]`` to ``[T, H, D]``."""
        return x[0] if self._are_all_of(x) else x[self.rows, self.columns]

    def put(self, packed: Tensor, like: Tensor) -> Tensor:
        """``[T, H, D]`` back to the shape of ``like``, zeros elsewhere."""
        if self._are_all_of(like):
            return packed[None]
        out = packed.new_zeros(like.shape)
        out[self.rows, self.columns] = packed
        return out

    def _are_all_of(self, x: Tensor) -> bool:
        return x.shape[0] == 1 and x.shape[1] == len(self.columns)


class Packing(NamedTuple):
    """Sequences with queries, one after another."""

    queries: Places
    keys: Places
    q_lens: list[int]
    kv_lens: list[int]

    def sequences(self, device: torch.device) -> dict[str, Tensor | int]:
        """What functions of :mod:`proxyattn.varlen` want to know of them."""
        return {
            "cu_seqlens_q": _starts(self.q_lens, device),
            "cu_seqlens_k": _starts(self.kv_lens, device),
            "max_seqlen_q": max(self.q_lens),
            "max_seqlen_k": max(self.kv_lens),
        }


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    starts = list(accumulate(lengths, initial=0))
    return torch.tensor(starts, dtype=torch.int32, device=device)


def packing_of(sequences: Tensor, batch: int, q_len: int) -> Packing:
    """The sequences of a sign that have queries.

    Args:
        sequences: int32 ``[B or 1, kv_len]`` on the CPU, as in the sign.
        batch: rows that there are.
        q_len: queries of a row, its last tokens.
    """
    seen = num_tokens(sequences)
    numbers = sequences[:, :seen].expand(batch, seen).to(torch.int64)
    rows, columns = (numbers >= FIRST_SEQUENCE).nonzero(as_tuple=True)
    owners = numbers[rows, columns] + rows * (1 + int(numbers.max()) if numbers.numel() else 1)
    _, owners = owners.unique(return_inverse=True)
    order = owners.argsort(stable=True)
    rows, columns, owners = rows[order], columns[order], owners[order]

    first_query = seen - q_len
    asks = columns >= first_query
    q_lens = owners[asks].bincount(minlength=int(owners.max()) + 1 if owners.numel() else 0)
    used = (q_lens > 0)[owners]
    rows, columns, owners, asks = rows[used], columns[used], owners[used], asks[used]
    kv_lens = owners.bincount(minlength=len(q_lens))
    return Packing(
        Places(rows[asks], columns[asks] - first_query),
        Places(rows, columns),
        q_lens[q_lens > 0].tolist(),
        kv_lens[kv_lens > 0].tolist(),
    )
