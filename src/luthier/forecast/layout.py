"""A micro-batch as numbers: what `batch.collate` and `Documents` make of rows, without tensors.

Source: the same functions that lay out the real ones (`trie.grow`, `documents.grouped`), so that what is
counted here is what will be computed and kept. Memory (`forecast.footprint`) and operations
(`forecast.flops`) are closed forms of these numbers.

It does not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luthier.engine import attention, batch, documents, trie, units
from luthier.template import Encoded


@dataclass(frozen=True, slots=True)
class Layout:
    """One micro-batch.

    tokens:      computed, each shared one once.
    loss_tokens: rows of logits.
    places:      of documents laid out side by side, each as long as its group's longest.
    pairs:       query places × keys they are multiplied with, over all groups.
    kept:        those of `pairs` whose probabilities are kept for the way back.
    widest:      the most of them in one block of queries, and the places of its group.
    streamed:    attention runs through torch's kernel, which holds no pairs (windows aside).
    slots:       of keys, for what each unit of `engine.flash` sends to them.

    All but the first two and the last are for attention as batched products.
    """

    tokens: int
    loss_tokens: int
    places: int
    pairs: int
    kept: int
    widest: tuple[int, int]
    streamed: bool
    slots: int


def of(rows: Sequence[Encoded]) -> Layout:
    """The layout of one micro-batch of these rows."""
    tree = trie.grow([row.ids for row in rows])
    lengths = [part.stop - part.start for part in tree.segments]
    shares = sum(lengths) < sum(len(row.ids) for row in rows)
    parents = [part.parent for part in tree.segments] if shares else []
    laid = lengths if shares else [len(row.ids) for row in rows]
    runs, through = documents.grouped(laid, parents)
    groups = []  # (places, pairs, those of the widest block of queries, reach)
    for parent, run in runs:
        before = sum(length for _, _, length in through[parent]) if parent >= 0 else 0
        reach = before + max(run)
        pairs = [
            len(run) * (last - first) * (before + last) for first, last in documents.blocks(max(run), reach)
        ]
        groups.append((len(run) * max(run), sum(pairs), max(pairs), reach))
    return Layout(
        tokens=sum(lengths),
        loss_tokens=sum(sum(row.mask[1:]) for row in rows),
        places=sum(places for places, *_ in groups),
        pairs=sum(pairs for _, pairs, _, _ in groups),
        kept=sum(pairs for _, pairs, _, reach in groups if reach <= documents.SHORT),
        widest=max((widest, places) for places, _, widest, _ in groups),
        streamed=max(reach for *_, reach in groups) > attention.LONG,
        slots=units.slots(laid, parents),
    )


def step(rows: Sequence[Encoded], budget: int) -> tuple[Layout, ...]:
    """The layouts of a step's micro-batches of at most `budget` tokens, packed as they will be."""
    return tuple(of([rows[row] for row in members]) for members in batch.bins(rows, budget))
