"""Which rows of a step run sparse, decided from numbers that are on the host anyway.

A step of vLLM has rows, one request each, their queries one behind another. Sparse attention takes
a span of neighbouring rows, from the first long row to the last, in one call. Short rows between
these, which vLLM's order (decodes first, then by rising query lengths) allows but seldom has, are
in the span with no keys, which costs next to nothing and leaves zeros that the dense calls behind
it overwrite. These take the runs of rows that are not long.

A call's scratch goes by its number of rows times the most keys of one, since only the device knows
what they sum up to. Where that is more than there is room for, the span becomes several.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SPARSE = "sparse"
DECODE = "decode"
FEW_QUERIES = "few queries"
SHORT = "short"


@dataclass(frozen=True)
class Span:
    """Neighbouring rows, ``rows`` and ``tokens`` half-open, and the most that one of them has.

    ``hidden`` are those that have no keys here, since another span has them too.
    """

    rows: tuple[int, int]
    tokens: tuple[int, int]
    max_queries: int
    max_keys: int
    hidden: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What runs how: the sparse spans first, then the dense ones."""

    sparse: tuple[Span, ...]
    dense: tuple[Span, ...]


def kinds_of(
    starts: Sequence[int], keys: Sequence[int], min_seqlen: int, min_queries: int
) -> list[str | None]:
    """What each row is: one of the words above, None without queries (padding).

    Args:
        starts: of each row its first query, and behind the last the number of queries.
        keys: of each row how many keys it sees at most, the new ones among them.
        min_seqlen, min_queries: what a long row has at least.
    """
    return [
        _kind(starts[row + 1] - starts[row], seen, min_seqlen, min_queries)
        for row, seen in enumerate(keys)
    ]


def _kind(queries: int, keys: int, min_seqlen: int, min_queries: int) -> str | None:
    if queries == 0:
        return None
    if queries == 1:
        return DECODE
    if queries < min_queries:
        return FEW_QUERIES
    return SHORT if keys < min_seqlen else SPARSE


def make_plan(
    kinds: Sequence[str | None], starts: Sequence[int], keys: Sequence[int], room: int
) -> Plan | None:
    """The plan of rows of these kinds, or None if none of them is sparse.

    Args:
        kinds, starts, keys: as in :func:`kinds_of`, which gives the first.
        room: keys that a call has scratch for, if it has more than one row.
    """
    sparse = []
    for first, last in _sparse_runs(kinds, keys, room):
        hidden = tuple(row for row in range(first, last) if kinds[row] not in (SPARSE, None))
        sparse.append(_span(first, last, starts, keys, hidden))
    if not sparse:
        return None
    return Plan(tuple(sparse), tuple(_span(*run, starts, keys) for run in _dense_runs(kinds)))


def _span(
    first: int,
    last: int,
    starts: Sequence[int],
    keys: Sequence[int],
    hidden: tuple[int, ...] = (),
) -> Span:
    return Span(
        rows=(first, last),
        tokens=(starts[first], starts[last]),
        max_queries=max(starts[row + 1] - starts[row] for row in range(first, last)),
        max_keys=max(keys[row] for row in range(first, last) if row not in hidden),
        hidden=hidden,
    )


def _sparse_runs(
    kinds: Sequence[str | None], keys: Sequence[int], room: int
) -> list[tuple[int, int]]:
    """From a sparse row to another, as far as there is room."""
    runs: list[tuple[int, int]] = []
    most = 0  # keys of a row of the last run
    for row, kind in enumerate(kinds):
        if kind != SPARSE:
            continue
        most = max(most, keys[row])
        if runs and (row + 1 - runs[-1][0]) * most <= room:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
            most = keys[row]
    return runs


def _dense_runs(kinds: Sequence[str | None]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for row, kind in enumerate(kinds):
        if kind in (SPARSE, None):
            continue
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def count_kinds(kinds: Sequence[str | None]) -> Counter:
    """How many rows of each kind there are, padding left out."""
    return Counter(kind for kind in kinds if kind is not None)
