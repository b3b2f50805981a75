"""From rows to micro-batches: which rows make a step, and how they are laid end to end without padding.

Sources: the order of an epoch is a sort by SHA-256 of (seed, epoch, row id), so it is the same on every
machine and library version, and needs no generator state to resume; packing is best-fit decreasing
(Johnson et al. 1974) by a token budget, which counts tokens that rows share once. Rows that share their
beginning are packed together as far as the budget goes (`engine.trie`); the documents of one row always are.
Everything here is a function of (rows, seed, step).

It does not know models, losses or time.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch

from luthier.engine import trie
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


def collate(rows: Sequence[Encoded], block: int = trie.BLOCK) -> Batch:
    """Lay rows end to end, what they share only once (in blocks of `block` tokens; 0 shares nothing).

    A row's first token is never a target: nothing before it predicts it.
    """
    tree = trie.grow([row.ids for row in rows], block)
    lengths = [segment.stop - segment.start for segment in tree.segments]
    starts = list(accumulate(lengths, initial=0))
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for number, row in enumerate(rows):
        own = [at for part in tree.path(number) for at in range(starts[part], starts[part + 1])]
        learnt = [at for at in range(1, len(row.ids)) if row.mask[at]]
        places += [own[at - 1] for at in learnt]
        targets += [row.ids[at] for at in learnt]
        owners += [number] * len(learnt)
    shares = starts[-1] < sum(len(row.ids) for row in rows)
    tokens = [token for part in tree.segments for token in rows[part.row].ids[part.start : part.stop]]
    return Batch(
        ids_T=torch.tensor(tokens, dtype=torch.long),
        positions_T=torch.cat([torch.arange(part.start, part.stop) for part in tree.segments]),
        lengths_D=tuple(len(row.ids) for row in rows),
        places_N=torch.tensor(places, dtype=torch.long),
        targets_N=torch.tensor(targets, dtype=torch.long),
        rows_N=torch.tensor(owners, dtype=torch.long),
        rows=tuple(row.id for row in rows),
        lengths_S=tuple(lengths) if shares else (),
        parents_S=tuple(part.parent for part in tree.segments) if shares else (),
        parts_D=tuple(row.part for row in rows) if any(row.part for row in rows) else (),
    )


def bonds(documents: Sequence[Encoded]) -> tuple[range, ...]:
    """The documents of each row, as numbers: one begins where `part` is 0."""
    starts = [at for at, document in enumerate(documents) if not document.part]
    return tuple(range(start, stop) for start, stop in pairwise([*starts, len(documents)]))


def flat(rows: Iterable[tuple[Encoded, ...]]) -> list[Encoded]:
    """The documents of these rows, one row after the other."""
    return [document for row in rows for document in row]


def bins(rows: Sequence[Encoded], budget: int) -> tuple[tuple[int, ...], ...]:
    """The documents of each micro-batch of at most `budget` tokens: what `trie.pieces` keeps, packed."""
    kept = trie.pieces([row.ids for row in rows], budget, bonds=bonds(rows))
    packed = pack([tokens for _, tokens in kept], budget)
    return tuple(tuple(row for piece in members for row in kept[piece][0]) for members in packed)


def sizes(rows: Sequence[Encoded], budget: int) -> tuple[int, ...]:
    """The tokens that each of `micro_batches` computes, without making them."""
    return tuple(trie.size([rows[row].ids for row in members]) for members in bins(rows, budget))


def micro_batches(rows: Sequence[Encoded], budget: int) -> tuple[Batch, ...]:
    """These rows as packed micro-batches of at most `budget` tokens."""
    return tuple(collate([rows[number] for number in members]) for members in bins(rows, budget))


@dataclass(frozen=True)
class Loader:
    """The micro-batches of any step, on demand: its whole state is the step's number.

    `rows` holds the documents of each row that the steps use (`Loader.needed` says which); `ids` names all
    rows of the data set.
    """

    ids: tuple[str, ...]
    rows: dict[int, tuple[Encoded, ...]]
    batch: int
    micro_tokens: int
    seed: int

    def __call__(self, step: int) -> tuple[Batch, ...]:
        chosen = rows_of(self.ids, self.batch, self.seed, step)
        return micro_batches(flat(self.rows[row] for row in chosen), self.micro_tokens)

    @staticmethod
    def needed(ids: tuple[str, ...], batch: int, seed: int, steps: int) -> tuple[int, ...]:
        """Every row that steps 1 … `steps` will read, sorted."""
        return tuple(sorted({row for step in range(1, steps + 1) for row in rows_of(ids, batch, seed, step)}))
