"""Objectives: what is minimised. One file is one loss, with its paper, its equation and its own `Params`.

A part declares `Params`, `ROWS` (the row type it reads), `NEEDS` (what else must be at hand, a subset of
reference, teacher, value, rollouts), `METRICS` (names of what it tells beside the loss, if any) and a pure
`loss(policy, reference, batch, params) -> Loss`, where `policy` and `reference` are log-probabilities of the
batch's target tokens (`logp_N`). A loss never sees a model, an optimiser or a device.

This module does not know how a batch is built or a loss is minimised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Documents (D) laid end to end (T tokens, no padding) and the tokens to be learnt (N of them).

    Documents that begin alike may share segments (S), each laid out once; then T is less than their sum.

    ids_T, positions_T:  the tokens, and their place in their own document.
    lengths_D:           tokens of each document, shared or not.
    places_N:            where in T the hidden state lies that predicts a target (one before the target);
                         documents that share it may each have a target there.
    targets_N, rows_N:   the token to predict there, and the number of its document.
    rows:                id of each document's row.
    lengths_S:           tokens of each segment; they sum to T. Empty: nothing is shared.
    parents_S:           number of the segment that each one follows; -1 where a document begins.
    advantages_D:        of documents that the policy itself said: how much better each is than expected.
    behaviour_N:         of their targets: the log-probability under the policy that said them; None: as now.
    reference_N:         and under the reference, where an objective asks for it.
    temperature:         what divides logits before a log-probability is taken.
    parts_D:             place of each document in its row, where rows have several: a row's documents stand
                         together, from 0 on. Empty: each document is a row.
    """

    ids_T: Tensor
    positions_T: Tensor
    lengths_D: tuple[int, ...]
    places_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    rows: tuple[str, ...]
    lengths_S: tuple[int, ...] = ()
    parents_S: tuple[int, ...] = ()
    advantages_D: Tensor | None = None
    behaviour_N: Tensor | None = None
    reference_N: Tensor | None = None
    temperature: float = 1.0
    parts_D: tuple[int, ...] = ()


@dataclass(frozen=True)
class Loss:
    """A sum over `count` units, not a mean: the engine divides by the units of the whole optimiser step.

    So are the metrics, by the names that the objective declares.
    """

    total: Tensor
    count: int
    metrics: Mapping[str, float] = field(default_factory=dict)
