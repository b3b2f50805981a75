"""How a batch's tokens fall into documents, and which documents attend in one product.

Neighbours of like length form a group, laid out over equally many places: padding behind a document's end
changes nothing before it, as no token looks ahead, and is dropped at once. Documents may follow another one,
whose tokens they see before their own (`engine.trie`). Built once per batch, used by every layer.

It does not know queries, keys or heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from luthier.engine import units

SHORT = 256  # tokens; up to here a document's probabilities are kept for the way back, else computed again
QUERIES = 256  # of a long document, in one block


@dataclass(frozen=True)
class Group:
    """Neighbouring documents that attend in one call, each laid out over `length` places.

    spread_P: for each of documents × length places, the group's token that lies there (any, behind the end).
    gather_T: for each of the group's tokens, its place.
    path:     documents that all of these follow, first to last: each one's group, number there and length.
    before:   how many tokens those have.
    """

    start: int
    tokens: int
    documents: int
    length: int
    spread_P: Tensor
    gather_T: Tensor
    path: tuple[tuple[int, int, int], ...] = ()
    before: int = 0

    @property
    def reach(self) -> int:
        """How many keys the last query of a document sees."""
        return self.before + self.length

    @property
    def short(self) -> bool:
        """Whether probabilities are kept for the way back."""
        return self.reach <= SHORT

    @property
    def even(self) -> bool:
        """Whether documents are equally long, so that tokens lie in their places already."""
        return self.tokens == self.documents * self.length

    @property
    def blocks(self) -> list[tuple[int, int]]:
        return blocks(self.length, self.reach)


@dataclass(frozen=True)
class Documents:
    """How a batch's tokens fall into documents; laid out once per batch, used by every layer.

    parents_D: an earlier document that each one follows, -1 or empty: none.
    """

    lengths_D: tuple[int, ...]
    parents_D: tuple[int, ...] = ()

    @staticmethod
    def of(lengths_D: Sequence[int], parents_D: Sequence[int] = ()) -> Documents:
        return Documents(tuple(lengths_D), tuple(parents_D))

    @cached_property
    def tokens(self) -> int:
        return sum(self.lengths_D)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbours that follow the same document: short ones unless one is more than twice another, long
        ones if equal."""
        runs, through = grouped(self.lengths_D, self.parents_D)
        groups, start = [], 0
        for parent, run in runs:
            groups.append(_group(start, run, through[parent] if parent >= 0 else ()))
            start += sum(run)
        return tuple(groups)

    @cached_property
    def units(self) -> units.Units:
        return units.of(self.lengths_D, self.parents_D)


Step = tuple[int, int, int]  # a document on a path: its group, its number there, its length


def grouped(
    lengths_D: Sequence[int], parents_D: Sequence[int] = ()
) -> tuple[list[tuple[int, list[int]]], list[tuple[Step, ...]]]:
    """(parent, lengths) of each group, and for each document the path up to and with itself."""
    runs: list[tuple[int, list[int]]] = []
    through: list[tuple[Step, ...]] = []
    for length, parent in zip(lengths_D, parents_D or (-1,) * len(lengths_D), strict=True):
        if runs and runs[-1][0] == parent and _like(length, runs[-1][1]):
            runs[-1][1].append(length)
        else:
            runs.append((parent, [length]))
        here = (len(runs) - 1, len(runs[-1][1]) - 1, length)
        through.append((*(through[parent] if parent >= 0 else ()), here))
    return runs, through


def blocks(length: int, reach: int) -> list[tuple[int, int]]:
    """The queries that attend at once, as pieces of a document: all of them if it is short."""
    step = length if reach <= SHORT else QUERIES
    return [(first, min(first + step, length)) for first in range(0, length, step)]


def _like(length: int, run: Sequence[int]) -> bool:
    longest, shortest = max(length, *run), min(length, *run)
    return longest == shortest or (longest <= SHORT and 2 * shortest >= longest)


def _group(start: int, lengths: Sequence[int], path: tuple[tuple[int, int, int], ...]) -> Group:
    longest, begin = max(lengths), 0
    spread, gather = [], []
    for number, length in enumerate(lengths):
        place = torch.arange(longest)
        spread.append(begin + place.clamp(max=length - 1))
        gather.append(number * longest + place[:length])
        begin += length
    before = sum(length for _, _, length in path)
    return Group(start, begin, len(lengths), longest, torch.cat(spread), torch.cat(gather), path, before)
