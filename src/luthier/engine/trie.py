"""Rows as a prefix tree: tokens that several rows begin with are one segment, laid out and computed once.

Sources: Tree Training (arXiv 2511.00413) and prefix sharing for preference pairs (arXiv 2410.20305). As in
paged key-value caches (Kwon et al. 2023, arXiv 2309.06180), prefixes are compared block by block: rows part
at the last whole block they have in common, so what a set of rows costs does not depend on which rows are
beside it. Equal rows share all they have, however short; other segments are shared in whole blocks.

Segments are laid out level by level, and the children of one segment from long to short: those that follow
the same tokens are neighbours, and can attend in one product. Where nothing is shared, a row is a segment,
in the order given. Everything here is a function of the tokens alone.

It does not know tensors, targets or models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

BLOCK = 16  # tokens; a shorter common beginning costs more in small products than it saves
Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` … `stop` of row `row` and of all rows that agree so far; -1 is no parent."""

    row: int
    start: int
    stop: int
    parent: int


@dataclass(frozen=True)
class Tree:
    """Segments, each after its parent, and for each row the segment that its last token lies in."""

    segments: tuple[Segment, ...]
    ends: tuple[int, ...]

    def path(self, row: int) -> tuple[int, ...]:
        """The segments that make up a row, from its first token on."""
        found, at = [], self.ends[row]
        while at >= 0:
            found.append(at)
            at = self.segments[at].parent
        return tuple(found[::-1])


def grow(rows: Sequence[Ids], block: int = BLOCK) -> Tree:
    """The tree of these rows. A `block` of 0 shares nothing."""
    order, shared = _neighbours(rows, block)
    if not any(shared):
        alone = tuple(Segment(row, 0, len(ids), -1) for row, ids in enumerate(rows))
        return Tree(alone, tuple(range(len(rows))))
    segments: list[Segment] = []
    ends = [-1] * len(rows)
    waiting = deque([(0, len(rows), 0, -1)])  # rows first … last of `order` that agree up to `start`
    while waiting:
        first, last, start, parent = waiting.popleft()
        children = []
        for low, high in _runs(shared, first, last, start):
            stop = min(shared[low + 1 : high], default=len(rows[order[low]]))
            children.append((start - stop, order[low], low, high))
        for negative, row, low, high in sorted(children):
            stop = start - negative
            while low < high and len(rows[order[low]]) == stop:  # rows that end here come first
                ends[order[low]] = len(segments)
                low += 1
            if low < high:
                waiting.append((low, high, stop, len(segments)))
            segments.append(Segment(row, start, stop, parent))
    return Tree(tuple(segments), tuple(ends))


def pieces(
    rows: Sequence[Ids], budget: int, block: int = BLOCK, bonds: Sequence[range] = ()
) -> tuple[tuple[tuple[int, ...], int], ...]:
    """Rows to keep together, and the tokens of their tree, in the order of each piece's first row.

    Rows that share their beginning make a piece. One of more than `budget` tokens is cut, in the order of
    its tokens, as often as the budget asks, but never through a bond: neighbours that belong together, such
    as the two sides of a pair. Of bonds whose later rows share too, the tokens are counted at their most.
    """
    bonds = bonds or [range(row, row + 1) for row in range(len(rows))]
    order, shared = _neighbours([rows[bond[0]] for bond in bonds], block)
    found: list[tuple[list[int], int]] = []
    for number, common in zip(order, shared, strict=True):
        bond = bonds[number]
        alone = size([rows[row] for row in bond], block)
        if common and found[-1][1] + alone - common <= budget:
            members, tokens = found[-1]
            found[-1] = ([*members, *bond], tokens + alone - common)
        else:
            found.append(([*bond], alone))
    return tuple(sorted((tuple(members), tokens) for members, tokens in found))


def size(rows: Sequence[Ids], block: int = BLOCK) -> int:
    """The tokens of these rows' tree."""
    if len(rows) == 1:
        return len(rows[0])
    return sum(part.stop - part.start for part in grow(rows, block).segments)


def _neighbours(rows: Sequence[Ids], block: int) -> tuple[list[int], list[int]]:
    """Row numbers in the order of their tokens, and what each shares with the one before it."""
    order = sorted(range(len(rows)), key=lambda row: (rows[row], row))
    shared = [_common(rows[one], rows[other], block) for one, other in pairwise(order)]
    return order, [0, *shared][: len(order)]


def _common(one: Ids, other: Ids, block: int) -> int:
    if not block:
        return 0
    if one == other:
        return len(one)
    ends = range(block, min(len(one), len(other)) + 1, block)
    return block * bisect_left(ends, True, key=lambda end: one[:end] != other[:end])


def _runs(shared: Sequence[int], first: int, last: int, start: int) -> list[tuple[int, int]]:
    """Pieces of first … last whose neighbours share more than `start` tokens."""
    cuts = [at for at in range(first + 1, last) if shared[at] <= start]
    return list(pairwise([first, *cuts, last]))
