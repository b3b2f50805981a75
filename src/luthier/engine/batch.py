"""From rows to micro-batches: which rows make a step, and how they are laid end to end without padding.

Sources: the order of an epoch is a sort by SHA-256 of (seed, epoch, row id), so it is the same on every
machine and library version, and needs no generator state to resume; packing is best-fit decreasing
(Johnson et al. 1974) by a token budget. Everything here is a function of (rows, seed, step).

It does not know models, losses or time.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from luthier.objectives import Batch
from luthier.template import Encoded


@lru_cache(maxsize=4)
def order(ids: tuple[str, ...], seed: int, epoch: int | str) -> tuple[int, ...]:
    """A permutation of the rows. Equal ids (kept duplicates) are told apart by how often they came before."""
    seen: dict[str, int] = {}

    def key(row: int) -> bytes:
        again = seen[ids[row]] = seen.get(ids[row], -1) + 1
        return hashlib.sha256(f"{seed}:{epoch}:{ids[row]}:{again}".encode()).digest()

    keys = [key(row) for row in range(len(ids))]
    return tuple(sorted(range(len(ids)), key=lambda row: (keys[row], row)))


def rows_of(ids: tuple[str, ...], batch: int, seed: int, step: int) -> tuple[int, ...]:
    """The rows of step 1, 2, …: consecutive pieces of epoch after epoch; no row is dropped."""
    places = range((step - 1) * batch, step * batch)
    return tuple(order(ids, seed, place // len(ids))[place % len(ids)] for place in places)


def pack(lengths: Sequence[int], budget: int) -> tuple[tuple[int, ...], ...]:
    """Bins of row numbers, each of at most `budget` tokens (a longer row has a bin to itself).

    Best-fit decreasing. Inside a bin rows go from long to short, so equal lengths are neighbours.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        at = bisect_left(room, (lengths[row], -1))
        if at == len(room):
            bins.append([row])
            left, bin_ = budget - lengths[row], len(bins) - 1
        else:
            left, bin_ = room.pop(at)
            bins[bin_].append(row)
            left -= lengths[row]
        insort(room, (left, bin_))
    return tuple(tuple(members) for members in bins)


def collate(rows: Sequence[Encoded]) -> Batch:
    """Lay rows end to end. A row's first token is never a target: nothing before it predicts it."""
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    start = 0
    for number, row in enumerate(rows):
        learnt = [at for at in range(1, len(row.ids)) if row.mask[at]]
        places += [start + at - 1 for at in learnt]
        targets += [row.ids[at] for at in learnt]
        owners += [number] * len(learnt)
        start += len(row.ids)
    return Batch(
        ids_T=torch.tensor([token for row in rows for token in row.ids], dtype=torch.long),
        positions_T=torch.cat([torch.arange(len(row.ids)) for row in rows]),
        lengths_D=tuple(len(row.ids) for row in rows),
        places_N=torch.tensor(places, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        rows_N=torch.tensor(owners, dtype=torch.long),
        rows=tuple(row.id for row in rows),
    )


def micro_batches(rows: Sequence[Encoded], budget: int) -> tuple[Batch, ...]:
    """These rows as packed micro-batches of at most `budget` tokens."""
    bins = pack([len(row.ids) for row in rows], budget)
    return tuple(collate([rows[number] for number in members]) for members in bins)


@dataclass(frozen=True)
class Loader:
    """The micro-batches of any step, on demand: its whole state is the step's number.

    `rows` holds what the steps use (`Loader.needed` says which); `ids` names all rows of the data set.
    """

    ids: tuple[str, ...]
    rows: dict[int, Encoded]
    batch: int
    micro_tokens: int
    seed: int

    def __call__(self, step: int) -> tuple[Batch, ...]:
        chosen = rows_of(self.ids, self.batch, self.seed, step)
        return micro_batches([self.rows[row] for row in chosen], self.micro_tokens)

    @staticmethod
    def needed(ids: tuple[str, ...], batch: int, seed: int, steps: int) -> tuple[int, ...]:
        """Every row that steps 1 … `steps` will read, sorted."""
        return tuple(sorted({row for step in range(1, steps + 1) for row in rows_of(ids, batch, seed, step)}))
