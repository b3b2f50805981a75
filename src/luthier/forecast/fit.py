"""The way of training that fits into so much memory, and what to change where none does.

Order of choice: keep everything; smaller micro-batches, down to the longest row alone; then compute the
MLP's wide product again; then whole layers. Each is judged by the forecast over the micro-batches that will
really come. What is offered where nothing fits is one change each, and was forecast to fit first.

It does not know how long anything takes, nor recipes: changes are named by what they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from luthier.engine import batch, trie
from luthier.forecast import footprint, layout
from luthier.forecast.footprint import Checkpointing, Forecast, How, Shape
from luthier.forecast.layout import Layout
from luthier.template import Encoded

WORTH = 0.97  # of the tokens: so many fewer to compute are worth a larger micro-batch's memory
Steps = tuple[tuple[Encoded, ...], ...]


@dataclass(frozen=True)
class Work:
    """What memory depends on.

    row_tokens: of all rows that the process holds. reference: rows that are also asked without a way back.
    """

    shape: Shape
    steps: Steps
    validation: tuple[Encoded, ...]
    how: How
    row_tokens: int
    reference: tuple[Encoded, ...] = ()
    known: dict[tuple[int, str], tuple[Layout, ...]] = field(default_factory=dict, compare=False)

    @cached_property
    def longest(self) -> int:
        """The tokens of the longest row, with all its documents."""
        return max(trie.size([step[at].ids for at in bond]) for step, bond in self.bonds())

    def bonds(self) -> Iterator[tuple[tuple[Encoded, ...], range]]:
        return ((step, bond) for step in self.steps for bond in batch.bonds(step))

    def layouts(self, budget: int) -> tuple[Layout, ...]:
        """Of all micro-batches that are learnt from."""
        return self._laid(budget, "steps", self.steps)

    def looks(self, budget: int) -> tuple[Layout, ...]:
        """Of those without a way back."""
        return self._laid(budget, "looks", (self.validation, self.reference))

    def _laid(self, budget: int, name: str, parts: tuple[tuple[Encoded, ...], ...]) -> tuple[Layout, ...]:
        if (budget, name) not in self.known:
            self.known[budget, name] = tuple(at for rows in parts for at in layout.step(rows, budget))
        return self.known[budget, name]

    def forecast(self, budget: int) -> Forecast:
        return footprint.forecast(self.shape, self.load(budget), self.how)

    def load(self, budget: int) -> footprint.Load:
        met, several = self.layouts(budget), len(self.layouts(budget)) > len(self.steps)
        return footprint.Load(met, self.looks(budget), several, len(self.steps), self.row_tokens)


@dataclass(frozen=True)
class Choice:
    """`micro_tokens`: the token budget of a micro-batch."""

    micro_tokens: int
    checkpointing: Checkpointing
    forecast: Forecast
    layouts: tuple[Layout, ...]


def choose(work: Work, allowed: float, budget: int, kinds: Sequence[Checkpointing]) -> Choice | None:
    """The first that fits `allowed` bytes, or None. `budget`: beyond so many tokens nothing gets faster."""
    for kind in kinds:
        now = replace(work, how=replace(work.how, checkpointing=kind))
        for tokens in budgets(budget, work.longest):
            found = now.forecast(tokens)
            if found.total <= allowed:
                return Choice(tokens, kind, found, now.layouts(tokens))
    return None


def enough(computed: Callable[[int], int], least: int, most: int) -> int:
    """The token budget, from `least` up, at which rows share what they can: with twice as large micro-batches
    nearly as many tokens would be left to compute. `computed`: how many there are at a budget."""
    budget, now = least, computed(least)
    while budget < most and (fewer := computed(2 * budget)) <= WORTH * now:
        budget, now = 2 * budget, fewer
    return budget


def budgets(most: int, longest: int) -> Iterator[int]:
    """Ever fewer tokens, down to the longest row alone."""
    tokens = most
    while tokens > longest:
        yield tokens
        tokens //= 2
    yield longest


def least(work: Work, kinds: Sequence[Checkpointing]) -> Forecast:
    """What the longest row alone takes, computing again as much as is allowed."""
    now = replace(work, how=replace(work.how, checkpointing=kinds[-1]))
    return now.forecast(work.longest)


def shorter(work: Work, allowed: float) -> int | None:
    """The longest documents that would fit, each cut there, if any of eight tokens or more do."""
    rows = [[step[at] for at in bond] for step, bond in work.bonds()]

    def fits(length: int) -> bool:
        at = tuple(
            layout.of([replace(one, ids=one.ids[:length], mask=one.mask[:length]) for one in row])
            for row in rows
        )
        load = replace(work.load(work.longest), layouts=at)
        return footprint.forecast(work.shape, load, work.how).total <= allowed

    return most(fits, 8, max(len(one.ids) for row in rows for one in row) - 1)


def fewer_layers(work: Work, allowed: float) -> Shape | None:
    """A smaller base of the same kind: the most layers of this width that would fit."""

    def shape(layers: int) -> Shape:
        return footprint.smaller(work.shape, layers)

    found = most(
        lambda layers: replace(work, shape=shape(layers)).forecast(work.longest).total <= allowed,
        1,
        work.shape.layers - 1,
    )
    return None if found is None else shape(found)


def most(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number that fits, where all smaller ones do too."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = math.ceil((low + high) / 2)
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
