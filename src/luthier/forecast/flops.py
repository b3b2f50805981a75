"""How many floating-point operations a packed training step takes; a multiply and an add are two.

Sources: a product of (m, k) and (k, n) is 2 m k n operations. A frozen weight has one product forward and one
back (the gradient of its input, none of its own); an adapter two forward and four back; attention two
forward and four back, and its scores once more where they are not kept; the head one forward and one for
its slope, over tokens with a loss only (`engine.head`). Below the first adapter nothing is sent back.
Experts: those a token does not go through do no work (Jiang et al. 2024, arXiv 2401.04088).

It counts products, as `torch.utils.flop_counter` does, not the element-wise rest, which is traffic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from luthier.forecast.footprint import Checkpointing, Shape, Stack
from luthier.forecast.layout import Layout


@dataclass(frozen=True)
class Flops:
    """Operations by kind. `seen` is the share of attention's pairs that a causal kernel would compute."""

    blocks: int
    adapters: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.blocks + self.adapters + self.attention + self.head

    @property
    def useful(self) -> float:
        """As published rates count: no query is multiplied with a key that it must not see."""
        return self.total - self.attention / 2

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.blocks + other.blocks,
            self.adapters + other.adapters,
            self.attention + other.attention,
            self.head + other.head,
        )


NOTHING = Flops(0, 0, 0, 0)


def training(shape: Shape, at: Layout, checkpointing: Checkpointing = Checkpointing.NONE) -> Flops:
    """Forward and backward of one micro-batch."""
    forward = validation(shape, at)
    first, rest = _back(shape, at, first=True), _back(shape, at, first=False)
    blocks, adapters, attention = (
        one + (shape.layers - 1) * other for one, other in zip(first, rest, strict=True)
    )
    again = NOTHING
    if checkpointing is Checkpointing.FULL:
        again = Flops(forward.blocks, forward.adapters, forward.attention, 0)
    elif checkpointing is Checkpointing.SELECTIVE:
        for stack in shape.stacks[2:3]:
            frozen, low = _products(stack, at.tokens)
            again = Flops(shape.layers * frozen, shape.layers * low, 0, 0)
    return forward + again + Flops(blocks, adapters, attention, forward.head)


def validation(shape: Shape, at: Layout) -> Flops:
    """The forward pass alone."""
    products = [_products(stack, at.tokens) for stack in shape.stacks]
    return Flops(
        blocks=shape.layers * sum(blocks for blocks, _ in products),
        adapters=shape.layers * sum(adapters for _, adapters in products),
        attention=shape.layers * 4 * shape.queries * at.pairs,
        head=2 * at.loss_tokens * shape.width * shape.vocabulary,
    )


def _products(stack: Stack, tokens: int) -> tuple[int, int]:
    """Forward operations of a stack: (frozen weights, adapters)."""
    return 2 * tokens * stack.inputs * stack.outputs, 2 * tokens * stack.low


def _back(shape: Shape, at: Layout, first: bool) -> tuple[int, int, int]:
    """Backward operations of one layer: (frozen weights, adapters, attention)."""
    sent = not first  # whether something below this stack has to hear of its gradient
    blocks = adapters = attention = 0
    for number, stack in enumerate(shape.stacks):
        frozen, _ = _products(stack, at.tokens)
        if number == 1 and sent:
            again = 0 if at.streamed else at.pairs - at.kept
            attention = 2 * shape.queries * (4 * at.pairs + again)
        if number == 2:  # an MLP is one function: where any of it is asked for, all of it is done
            sent = sent or any(each.rank for each in shape.stacks[2:])
        blocks += frozen if sent else 0
        if stack.rank:
            own = 2 * at.tokens * stack.trained  # back, no block's zeros are multiplied
            adapters += 2 * own if sent else 2 * own - 2 * at.tokens * stack.rank * stack.inputs
            sent = True
        elif not sent:
            continue
    return blocks, adapters, attention


def summed(found: Iterable[Flops]) -> Flops:
    total = NOTHING
    for each in found:
        total = total + each
    return total


def active(weights: Mapping[str, int], experts: int, chosen: int) -> tuple[int, int]:
    """(all, at work for one token) of named weights, where names with `experts` in them are shared out."""
    inside = sum(count for name, count in weights.items() if ".experts." in name)
    whole = sum(weights.values())
    return whole, whole - inside + inside * chosen // experts


def sizes(outline: Any) -> dict[str, int]:
    """How many numbers each parameter has, by name."""
    return {name: weight.numel() for name, weight in outline.named_parameters()}
