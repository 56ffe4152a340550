"""A batch of sharded sequences as the varlen ops take it: the rank's queries packed, and the keys
of all ranks as pages, in the order in which a gather leaves them."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from proxyattn.distributed.layout import Chunk, Sharding

#: Tokens of a page, the longest first: fewer entries to look up.
PAGE_SIZES = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Tokens:
    """The tokens of every sequence of the batch: the shards of earlier calls, then those of this
    one, whose queries are there too."""

    shardings: tuple[Sharding, ...]

    @property
    def total(self) -> int:
        return sum(sharding.total for sharding in self.shardings)

    @property
    def before(self) -> int:
        """Tokens of earlier calls."""
        return self.total - self.shardings[-1].total

    @property
    def chunks(self) -> list[Chunk]:
        """Of keys, in order, each placed in the whole sequence and among all of its rank's."""
        chunks = []
        start, offsets = 0, [0] * self.shardings[0].world
        for sharding in self.shardings:
            for chunk in sharding.chunks:
                offset = offsets[chunk.rank] + chunk.offset
                chunks.append(Chunk(chunk.rank, start + chunk.start, offset, chunk.length))
            start += sharding.total
            offsets = [a + b for a, b in zip(offsets, sharding.lengths, strict=True)]
        return chunks

    def keys_on(self, rank: int) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.rank == rank]

    def queries_on(self, rank: int) -> list[Chunk]:
        """Chunks of queries of a rank, placed in the whole sequence and among the rank's."""
        return [
            Chunk(chunk.rank, chunk.start + self.before, chunk.offset, chunk.length)
            for chunk in self.shardings[-1].of_rank(rank)
        ]

    def capacity(self, op: str) -> int:
        """Tokens that a rank has at most, in whole pages."""
        lengths = zip(*(sharding.lengths for sharding in self.shardings), strict=True)
        page = self.page_size(op)
        return -(-max(map(sum, lengths)) // page) * page

    def page_size(self, op: str) -> int:
        """The longest page that no two chunks share.

        Raises:
            ValueError: where an earlier call ends inside the shortest.
        """
        used = [chunk for chunk in self.chunks if chunk.length > 0]
        for page in PAGE_SIZES:
            # The end of the sequence alone may lie inside a page.
            if not any(chunk.start % page or chunk.offset % page for chunk in used):
                return page
        raise ValueError(
            f"{op}: cached must have chunks and lengths of a multiple of {PAGE_SIZES[-1]} tokens, "
            f"got lengths {[sharding.total for sharding in self.shardings[:-1]]} in chunks of "
            f"{[sharding.chunk for sharding in self.shardings[:-1]]}"
        )


@dataclass(frozen=True)
class Packed:
    """A sequence of the varlen ops for every chunk of queries that the rank has of a sequence of
    the batch, with the keys up to the chunk's end: chunks end at different keys."""

    page: int
    capacity: int  # tokens that every rank has room for: whole pages
    max_seqlen_q: int
    max_seqlen_k: int
    numbers: Tensor  # all that the device must know, int32
    num_sequences: int

    def places(self, device: torch.device) -> dict:
        """What else than q, k and v a varlen op takes, by name."""
        sequences = self.num_sequences
        numbers = self.numbers.to(device)
        starts, used, table = numbers.split(
            [sequences + 1, sequences, len(numbers) - 2 * sequences - 1]
        )
        return {
            "cu_seqlens_q": starts,
            "cu_seqlens_k": None,
            "max_seqlen_q": self.max_seqlen_q,
            "max_seqlen_k": self.max_seqlen_k,
            "block_table": table.view(sequences, -1),
            "seqused_k": used,
        }


@lru_cache(maxsize=8)  # the layers of a model ask for the same
def pack(op: str, tokens: Tokens, batch: int, rank: int, causal: bool) -> Packed:
    """The call of one rank. Pages lie as ``[W, 2, B, capacity / page]``: keys, then values.

    Raises:
        ValueError: where pages can't hold the earlier calls' tokens.
    """
    page = tokens.page_size(op)
    capacity = tokens.capacity(op)
    pages = capacity // page
    queries = tokens.queries_on(rank)
    per_sequence = sum(chunk.length for chunk in queries)
    starts, used, table = [], [], []
    for sequence in range(batch):
        row = torch.cat(
            [
                (2 * batch * chunk.rank + sequence) * pages
                + torch.arange(chunk.offset // page, -(-(chunk.offset + chunk.length) // page))
                for chunk in tokens.chunks
            ]
        )
        for chunk in queries:
            starts.append(sequence * per_sequence + chunk.offset)
            used.append(chunk.start + chunk.length if causal else tokens.total)
            table.append(row)
    numbers = torch.cat([torch.tensor([*starts, batch * per_sequence, *used]), *table])
    return Packed(
        page,
        capacity,
        max(1, *(chunk.length for chunk in queries)),
        max(1, *used),
        numbers.to(torch.int32),
        len(starts),
    )
