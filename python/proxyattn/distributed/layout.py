"""Which tokens of a sequence each rank holds: chunks of one length, dealt out by a layout."""

from dataclasses import dataclass
from itertools import groupby

#: ``"zigzag"``: of 2W chunks rank r holds r and 2W - 1 - r, so that causal work is even;
#: ``"contiguous"``: of W chunks it holds the r-th.
LAYOUTS = ("zigzag", "contiguous")


@dataclass(frozen=True)
class Chunk:
    """Neighbouring tokens of one rank."""

    rank: int
    start: int  # place in the sequence
    offset: int  # place among the rank's tokens
    length: int

    @property
    def tokens(self) -> slice:
        return slice(self.start, self.start + self.length)

    @property
    def local_tokens(self) -> slice:
        return slice(self.offset, self.offset + self.length)


@dataclass(frozen=True)
class Sharding:
    """How a sequence of ``total`` tokens lies on ``world`` ranks."""

    layout: str
    world: int
    total: int
    chunk: int  # tokens of every chunk but the last, which may have fewer

    @property
    def chunks(self) -> list[Chunk]:
        """In the order of the sequence."""
        taken = [0] * self.world
        chunks = []
        for i, rank in enumerate(_owners(self.layout, self.world)):
            start = min(self.total, i * self.chunk)
            length = min(self.chunk, self.total - start)
            chunks.append(Chunk(rank, start, taken[rank], length))
            taken[rank] += length
        return chunks

    def of_rank(self, rank: int) -> list[Chunk]:
        return [chunk for chunk in self.chunks if chunk.rank == rank]

    @property
    def lengths(self) -> list[int]:
        """Tokens of every rank."""
        return [sum(chunk.length for chunk in self.of_rank(rank)) for rank in range(self.world)]


def _owners(layout: str, world: int) -> list[int]:
    """The rank of every chunk. One rank has one chunk, whatever the layout."""
    ranks = list(range(world))
    return [*ranks, *reversed(ranks)] if layout == "zigzag" and world > 1 else ranks


def check_layout(op: str, layout: str) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be 'zigzag' or 'contiguous', got {layout!r}")


def sharding_of(op: str, name: str, lengths: list[int], layout: str) -> Sharding:
    """The one sharding that gives the ranks so many tokens.

    Raises:
        ValueError: where there is none. ``name`` says whose tokens they are.
    """
    world, total = len(lengths), sum(lengths)
    # The last rank holds whole chunks alone, or the only one, or the end.
    chunk = lengths[-1] // 2 if layout == "zigzag" else lengths[0]
    sharding = Sharding(layout, world, total, total if world == 1 else chunk)
    if sharding.lengths != list(lengths):
        raise ValueError(
            f"{op}: {name} must lie on the ranks in chunks of one length, of which only the last "
            f"may be shorter, as layout={layout!r} deals them out, got {_listed(lengths)} tokens"
        )
    return sharding


def even_sharding(op: str, total: int, world: int, layout: str, block_size: int) -> Sharding:
    """Chunks as short as may be, of whole blocks, of which only the last is shorter.

    Raises:
        ValueError: where so few tokens make no such chunks.
    """
    pieces = len(_owners(layout, world))
    chunk = -(-total // (pieces * block_size)) * block_size
    if total < (pieces - 1) * chunk:
        raise ValueError(
            f"{op}: x must have tokens for {pieces - 1} chunks of a multiple of block_size="
            f"{block_size} and the beginning of another, got {total}; the next legal length is "
            f"{(pieces - 1) * chunk}"
        )
    return Sharding(layout, world, total, total if world == 1 else chunk)


def check_chunks(op: str, sharding: Sharding, block_size: int) -> None:
    """Raises ValueError unless chunks begin where blocks do."""
    if sharding.world > 1 and sharding.chunk % block_size:
        legal = -(-sharding.chunk // block_size) * block_size
        pieces = len(sharding.chunks)
        raise ValueError(
            f"{op}: q must have chunks of a multiple of block_size={block_size} tokens, got chunks "
            f"of {sharding.chunk}; the next legal length is {legal}, {pieces * legal} tokens in all"
        )


def _listed(lengths: list[int]) -> str:
    """``3 x 128 and 1 x 100``: in the order of the ranks."""
    return ", ".join(f"{len(list(run))} x {length}" for length, run in groupby(lengths))
