"""Bits per parameter: how a method's footprint is told in papers, whatever the batch is.

Sources: bits of weights, adapters, gradients and moments as in the table that QLoRA's authors drew up
(Dettmers et al. 2023, arXiv 2305.14314), double quantisation included. It does not know activations:
`footprint` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bits:
    """Bits per parameter of the base: how a method's footprint is told in papers."""

    weights: float
    adapters: float
    gradients: float
    optimiser: float

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.gradients + self.optimiser

    def total_bytes(self, parameters: float) -> float:
        return parameters * self.total / 8


def bits(weight_bits: float, share: float = 1.0, trained_bits: float = 16, moments_bits: float = 64) -> Bits:
    """`share` of as many weights as the base has train, each with a gradient and two moments; 1.0: itself."""
    adapters = 0.0 if share == 1.0 else share * trained_bits
    return Bits(weight_bits, adapters, share * trained_bits, share * moments_bits)


def constants_bits(blocks: Sequence[int], widths: Sequence[int] = (32,)) -> float:
    """Quantisation constants per weight: one of `widths[0]` bits for every `blocks[0]` weights, and one of
    `widths[1]` bits for every `blocks[1]` of those, and so on."""
    per_weight, reach = 0.0, 1
    for block, width in zip(blocks, widths, strict=True):
        reach *= block
        per_weight += width / reach
    return per_weight
