"""How a batch's attention is cut into pieces of work for `flash.cpp`, from its documents' lengths alone.

A unit is a stretch of queries that follow the same path of documents: neighbours together, so that the
path's keys are laid out once for them, or a part of a long document. Each has room of its own (slots) for
what its queries send to the keys they see, so that no two threads add to one number; what a key is owed by
several units is added up in their order. Long prompts with many short answers cost the most room: a path's
length for every `UNIT` tokens that follow it.

It does not know queries, keys or heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

UNIT = 256  # tokens of documents that make a unit
STRETCH = 1024  # tokens of a long document in one unit


@dataclass(frozen=True)
class Units:
    """How a batch's attention is cut up: the tables that `flash.cpp` reads, as int64.

    units:     first and end of path, first and end of pieces, tokens of the path, first slot
    path:      first token, tokens
    pieces:    first key, first query, queries, first slot
    documents: first token, tokens, first and end of what is owed to it
    owed:      first slot, keys
    slots:     of all units; each is the place of a key's gradient
    """

    units: Tensor
    path: Tensor
    pieces: Tensor
    documents: Tensor
    owed: Tensor
    slots: int


class _Piece(NamedTuple):
    document: int
    begin: int  # of its queries, in the document
    end: int


def of(lengths_D: tuple[int, ...], parents_D: tuple[int, ...] = ()) -> Units:
    """The units of documents that follow `parents_D` (-1 or empty: none), those with most work first."""
    # Whoever takes the next unit when he is done with one should not be left with a large one at the end.
    starts, paths = (0, *accumulate(lengths_D)), _paths(lengths_D, parents_D)
    before = [sum(lengths_D[at] for at in path[:-1]) for path in paths]
    cut = _cut(lengths_D, parents_D)
    cut.sort(key=lambda unit: -sum((x.end - x.begin) * (before[x.document] + x.end) for x in unit))
    slot, owed = 0, [[] for _ in lengths_D]  # type: tuple[int, list[list[tuple[int, int]]]]
    table: dict[str, list[Sequence[int]]] = {"units": [], "path": [], "pieces": []}
    for unit in cut:
        path, first = paths[unit[0].document][:-1], slot
        ends = len(table["path"]), len(table["path"]) + len(path)
        for at in path:
            table["path"].append((starts[at], lengths_D[at]))
            owed[at].append((slot, lengths_D[at]))
            slot += lengths_D[at]
        pieces = len(table["pieces"]), len(table["pieces"]) + len(unit)
        for number, begin, end in unit:
            table["pieces"].append((starts[number], starts[number] + begin, end - begin, slot))
            owed[number].append((slot, end))
            slot += end
        table["units"].append((*ends, *pieces, before[unit[0].document], first))
    ends_D = list(accumulate(map(len, owed)))
    documents = [
        (start, length, end - len(found), end)
        for start, length, end, found in zip(starts, lengths_D, ends_D, owed, strict=False)
    ]
    tables = [table["units"], table["path"], table["pieces"], documents, [x for found in owed for x in found]]
    given = [torch.tensor(rows, dtype=torch.int64) for rows in tables]
    return Units(given[0], given[1], given[2], given[3], given[4], slot)


def slots(lengths_D: Sequence[int], parents_D: Sequence[int] = ()) -> int:
    """`Units.slots`, without tensors."""
    paths = _paths(lengths_D, parents_D)
    return sum(
        sum(lengths_D[at] for at in paths[unit[0].document][:-1]) + sum(piece.end for piece in unit)
        for unit in _cut(lengths_D, parents_D)
    )


def _paths(lengths_D: Sequence[int], parents_D: Sequence[int]) -> list[tuple[int, ...]]:
    """The documents that each one follows, first to last, and itself."""
    paths: list[tuple[int, ...]] = []
    for number, parent in enumerate(parents_D or [-1] * len(lengths_D)):
        paths.append((*(paths[parent] if parent >= 0 else ()), number))
    return paths


def _cut(lengths_D: Sequence[int], parents_D: Sequence[int]) -> list[list[_Piece]]:
    """Neighbours that follow the same document, up to `UNIT` tokens; long documents in stretches."""
    found: list[list[_Piece]] = []
    last, room = -2, 0
    for number, (length, parent) in enumerate(
        zip(lengths_D, parents_D or [-1] * len(lengths_D), strict=True)
    ):
        if parent == last and length <= room:
            found[-1].append(_Piece(number, 0, length))
            room -= length
            continue
        for begin in range(0, length, STRETCH):
            found.append([_Piece(number, begin, min(begin + STRETCH, length))])
        last, room = parent, UNIT - length
    return found
