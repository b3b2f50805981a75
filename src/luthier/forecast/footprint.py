"""How many bytes training takes, by kind, before it takes them.

Sources: the shapes in the model's configuration; what `engine.fused`, `engine.attention` and `engine.head`
keep from the forward to the backward pass, tensor by tensor, for the micro-batches that will really come
(`forecast.layout`); Adam's two moments (Kingma & Ba 2015, arXiv 1412.6980).

Some numbers are not derived: what the process takes before any weight and what one compiled product of the
matrix library takes (both are measured where a trial can be made, `settled`), and, where tensors do not lie
in `engine.heap`, how much freed memory cannot be used again while batches change their size. That was fitted
to a few runs on glibc's heap (bench/results/2026-11-25-plan.json).

It does not know experts, optimisers that are sharded, or weights that train in the base itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from luthier.engine.fused import SIBLINGS
from luthier.engine.head import TILE
from luthier.forecast.layout import Layout

FLOAT32 = 4
RUN = {"q_proj": 0, "qkv_proj": 0, "o_proj": 1, "gate_proj": 2, "gate_up_proj": 2, "down_proj": 3}
PROCESS_BYTES = 475_000_000  # Python with torch, transformers and PEFT loaded, before any weight
PRODUCT_BYTES = 600_000  # one compiled product of the matrix library for one shape, 16 bit only
PRODUCTS = 128  # so many are kept
PRODUCTS_A_SIZE, PRODUCTS_A_TILE = 38, 2  # so many are made for a micro-batch of a new size, and for a tile
FRAGMENTATION = 0.15  # of what comes and goes with a step: freed pieces that fit nothing
SPREAD_BYTES = 105_000_000  # the same for any step: pieces that stay lie between those that go
LEAST_SPREAD_BYTES, SPREAD_SHARE = 55_000_000, 0.6  # of small models, and where little is kept, less
FRAGMENTATION_FLOAT32, SPREAD_FLOAT32_BYTES = 0.08, 40_000_000  # where no compiled products are made
SATURATED = 24  # steps after which no more is lost so; up to there each doubling loses as much again
BESIDE_BYTES = 8_000_000  # where tensors lose nothing (`engine.heap`): more of Python than a trial has
ROW_TOKEN_BYTES = 45  # a row's token and its mask, as Python keeps them


class Checkpointing(StrEnum):
    """What is not kept for the way back but computed again."""

    NONE = "none"
    SELECTIVE = "selective"  # the MLP's gate and up product
    FULL = "full"  # all but each layer's input


@dataclass(frozen=True)
class Stack:
    """Linear layers of one decoder layer that read the same input, and their adapters."""

    inputs: int
    outputs: int
    adapters: tuple[tuple[int, int], ...] = ()  # the rank of each, and the outputs of the layer it is at
    joined: bool = True  # of several layers, whose weights are copied into one tensor

    @property
    def rank(self) -> int:
        return sum(rank for rank, _ in self.adapters)

    @property
    def low(self) -> int:
        """Numbers in the stacked A's and the block diagonal of B's."""
        return self.rank * (self.inputs + self.outputs)

    @property
    def trained(self) -> int:
        """Numbers in the A's and B's: `low` without the zeros beside the blocks."""
        return sum(rank * (self.inputs + outputs) for rank, outputs in self.adapters)


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that memory and operations depend on.

    stacks:   of one layer, in the order they run: queries to values, attention's output, gate and up, down.
    mapped:   weights are read where the file lies in memory; stacked ones exist a second time.
    norms:    of one layer's width; those beyond two stand behind a product, whose output they keep.
    turns:    kinds of rotary tables; Gemma 3 has one for each kind of layer.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    parameters: int
    trainable: int
    weight_bytes: int
    stacks: tuple[Stack, ...]
    qk_norm: bool = False
    mapped: bool = False
    norms: int = 2
    turns: int = 1

    @property
    def queries(self) -> int:
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def blocks(self) -> int:
        """Weights of the layers' products."""
        return self.layers * sum(stack.inputs * stack.outputs for stack in self.stacks)


def shape(outline: Any, ranks: Mapping[str, int], weight_bytes: int, mapped: bool = False) -> Shape:
    """The shape of a model without weights; `ranks`: of each linear layer with an adapter, by name."""
    text = outline.config.get_text_config()
    layers = outline.get_decoder().layers
    heads = text.num_attention_heads
    prefix = next(name for name, module in outline.named_modules() if module is layers[0])
    linears = {
        name: (part.in_features, part.out_features, ranks.get(f"{prefix}.{name}", 0))
        for name, part in layers[0].named_modules()
        if hasattr(part, "in_features") and hasattr(part, "out_features")
    }
    adapted = {name: part for name, part in outline.named_modules() if name in ranks}
    return Shape(
        layers=text.num_hidden_layers, width=text.hidden_size, heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
        inner=text.intermediate_size, vocabulary=text.vocab_size,
        parameters=sum(weight.numel() for weight in outline.parameters()),
        trainable=sum(ranks[name] * (part.in_features + part.out_features) for name, part in adapted.items()),
        weight_bytes=weight_bytes, stacks=_stacks(linears), mapped=mapped,
        qk_norm=any(name.endswith("q_norm") for name, _ in layers[0].named_modules()),
        turns=max(1, sum(isinstance(x, dict) for x in dict(getattr(text, "rope_parameters", {})).values())),
        norms=sum(name.endswith("layernorm") for name, _ in layers[0].named_children()),
    )  # fmt: skip


def _stacks(linears: Mapping[str, tuple[int, int, int]]) -> tuple[Stack, ...]:
    """Siblings joined, in the order in which they run; others come behind."""
    found: dict[str, Stack] = {}
    joined: set[str] = set()
    for name, (inputs, _, _) in linears.items():
        leaf = name.rsplit(".", 1)[-1]
        names = next((group for group in SIBLINGS if leaf in group), (leaf,))
        if name in joined:
            continue
        members = [key for key in linears if key.rsplit(".", 1)[-1] in names]
        joined.update(members)
        outputs = sum(linears[key][1] for key in members)
        adapters = tuple((rank, out) for _, out, rank in (linears[key] for key in members) if rank)
        found[leaf] = Stack(inputs, outputs, adapters, len(members) > 1)
    return tuple(found[name] for name in sorted(found, key=lambda name: RUN.get(name, len(RUN))))


@dataclass(frozen=True)
class How:
    """In what way the same numbers are computed.

    here: on a CPU, whose matrix library keeps one compiled product for each shape of 16 bit numbers, and
        whose memory holds checkpoints until they are on disk.
    fragmentation: what freed pieces that fit nothing take of what comes and goes, without `heap`.
    sampling_bytes: what the same process holds to sample answers, beside all of training.
    flash: attention keeps what came in and went out, no scores (`engine.flash`, and kernels of a GPU).
    heap: tensors lie in a heap of their own (`engine.heap`), whose freed rooms are whole.
    """

    checkpointing: Checkpointing = Checkpointing.NONE
    compiled: bool = False
    tile: int = TILE
    process_bytes: int = PROCESS_BYTES
    fragmentation: float = FRAGMENTATION
    slack: float = 0.0
    here: bool = True
    product_bytes: int = PRODUCT_BYTES
    sampling_bytes: int = 0
    flash: bool = False
    heap: bool = False


@dataclass(frozen=True)
class Forecast:
    """Predicted bytes of a training process at its peak, by kind."""

    process: int
    rows: int
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    head: int
    checkpoint: int
    products: int
    slack: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}

    def bits(self, parameters: int) -> dict[str, float]:
        """Bits per parameter of the base, of what is there whatever the batch is."""
        kinds = ("weights", "adapters", "gradients", "optimiser")
        return {kind: round(8 * getattr(self, kind) / parameters, 3) for kind in kinds}


def layer_bytes(
    shape: Shape, at: Layout, checkpointing: Checkpointing = Checkpointing.NONE, flash: bool = False
) -> int:
    """What one decoder layer keeps from the forward to the backward pass."""
    c, d, tokens = shape.weight_bytes, shape.width, at.tokens
    if checkpointing is Checkpointing.FULL:
        return c * d * tokens
    again = checkpointing is Checkpointing.SELECTIVE
    read = bool(shape.stacks[0].rank) + bool(shape.stacks[2].rank or again)  # by products that need it again
    norms = tokens * ((2 + read) * c * d + 2 * FLOAT32)  # each: its input, one scale, its output where read
    norms += tokens * max(0, shape.norms - 2) * (c * d + FLOAT32)
    if shape.qk_norm:
        norms += tokens * (c * (shape.queries + shape.keys) + FLOAT32 * (shape.heads + shape.kv_heads))
    out = c * tokens * shape.queries  # of attention, and the input of its last product
    if flash:
        attention = c * tokens * (shape.queries + 2 * shape.keys) + FLOAT32 * tokens * shape.heads
    else:
        attention = c * at.places * (shape.queries + 2 * shape.keys) + c * shape.heads * at.kept
        attention += at.places * shape.heads * (c * shape.head_width + FLOAT32) if at.streamed else 0
        out = out if shape.stacks[1].rank else 0
    low = c * sum(stack.low + tokens * stack.rank for stack in shape.stacks)
    both = 0 if again else c * tokens * 2 * shape.inner
    return norms + attention + out + low + both


def passing_bytes(shape: Shape, at: Layout, how: How) -> int:
    """What the last layer's backward pass needs on top, for a moment: in its MLP, or in its attention."""
    c, tokens = shape.weight_bytes, at.tokens
    wide = 4 if how.compiled else 7  # (T, F) tensors: that of the hidden layer, its gradient, those between
    again = 0 if how.checkpointing is Checkpointing.NONE else 2
    gated = c * tokens * (shape.inner * (wide + again) + 3 * shape.width)
    pairs, places = at.widest
    each = 2 * c if how.compiled else 2 * c + 16  # of a pair: its weight, its gradient, float32 between
    scores = 0 if at.streamed else shape.heads * pairs * each + c * 2 * places * shape.queries
    if how.flash:
        scores = FLOAT32 * at.slots * 2 * shape.keys
    sent = c * tokens * (2 * shape.queries + 2 * shape.keys + shape.width)
    freed = 0 if how.checkpointing is Checkpointing.SELECTIVE else c * tokens * 2 * shape.inner
    return max(gated, scores + sent - freed)


def tile_bytes(shape: Shape, at: Layout, how: How) -> int:
    """The head at its most: a tile of logits, which compiled formulas make their gradient in place, and the
    hidden states of all tokens and of those with a loss."""
    c, rows = shape.weight_bytes, min(how.tile, at.loss_tokens)
    each = c if how.compiled else 2 * FLOAT32 + (c if c < FLOAT32 else 0)
    return rows * shape.vocabulary * each + c * shape.width * (at.tokens + at.loss_tokens)


def looking_bytes(shape: Shape, at: Layout, how: How) -> int:
    """What a look at held-out rows, or a reference, takes at its most: the head, or a layer's MLP."""
    wide = shape.weight_bytes * at.tokens * (4 * shape.inner + shape.width)
    return max(tile_bytes(shape, at, how), wide)


def moving_bytes(shape: Shape, at: Layout, how: How) -> tuple[int, int]:
    """(activations, head) of one micro-batch, when they are most together."""
    c, d = shape.weight_bytes, shape.width
    # The first norm keeps nothing, the last one does. Rotary tables are the same for all layers of a kind.
    each_layer = layer_bytes(shape, at, how.checkpointing, how.flash)
    kept = shape.layers * each_layer + 2 * c * shape.turns * shape.head_width * at.tokens
    slope = c * d * at.loss_tokens
    tile = tile_bytes(shape, at, how)
    passing = passing_bytes(shape, at, how)
    if how.checkpointing is Checkpointing.FULL:
        passing += layer_bytes(shape, at, flash=how.flash)
    return (kept + passing, slope) if passing >= tile else (kept, tile + slope)


@dataclass(frozen=True)
class Load:
    """What a training process will meet.

    layouts:    of all micro-batches; looks: of those without a way back.
    several:    whether a step may have more than one, and so gradients while another is on its way.
    row_tokens: of all rows that it holds.
    steps:      each lays its tensors out anew, as its micro-batches are of other sizes; glibc's heap minds.
    """

    layouts: tuple[Layout, ...]
    looks: tuple[Layout, ...] = ()
    several: bool = True
    steps: int = SATURATED
    row_tokens: int = 0


def forecast(shape: Shape, load: Load, how: How) -> Forecast:
    """The peak of a training process."""
    met = set(load.layouts)
    adapters = FLOAT32 * shape.trainable
    activations, head = max((moving_bytes(shape, at, how) for at in met), key=sum)
    if not load.several:  # gradients come as what was kept for them goes
        activations = max(0, activations - adapters)
    lost = lost_bytes(shape, activations + head, how, load.steps)
    looked = max((looking_bytes(shape, at, how) for at in set(load.looks)), default=0)
    if looked > activations + head + lost:  # freed memory is given back around a look
        activations, head = 0, looked
        lost = BESIDE_BYTES if how.heap else round(how.fragmentation * looked)
    known = {
        "process": how.process_bytes + how.sampling_bytes,
        "rows": ROW_TOKEN_BYTES * load.row_tokens,
        "weights": weights_bytes(shape),
        "adapters": adapters,
        "gradients": adapters,
        "optimiser": 2 * adapters,
        "activations": activations,
        "head": head,
        "checkpoint": 4 * adapters if how.here else 0,  # copies of weights and moments, the best weights
        "products": products_bytes(shape, how, met | set(load.looks)),
    }  # fmt: skip
    return Forecast(**known, slack=round(lost + how.slack * sum(known.values())))


def lost_bytes(shape: Shape, moving: int, how: How, steps: int) -> int:
    """Freed pieces that fit nothing: in any case some, and a share of what comes and goes.

    Steps of other sizes lose more and more, where compiled products are made and stay between. In a heap of
    their own tensors lose nothing; what is beside it is training's own code.
    """
    if how.heap:
        return BESIDE_BYTES
    if not how.here:
        return round(how.fragmentation * moving)
    if shape.weight_bytes == FLOAT32:
        return round(min(SPREAD_FLOAT32_BYTES, moving) + FRAGMENTATION_FLOAT32 * moving)
    grown = min(1.0, math.log2(2 * steps) / math.log2(2 * SATURATED))
    spread = min(SPREAD_BYTES, LEAST_SPREAD_BYTES + SPREAD_SHARE * moving)
    return round(grown * (spread + how.fragmentation * moving))


def products_bytes(shape: Shape, how: How, met: Iterable[Layout]) -> int:
    """What the matrix library keeps once it has met these micro-batches."""
    if not how.here or shape.weight_bytes == FLOAT32:
        return 0
    if how.flash:  # layers have products of our own then, too: the library has the head's alone
        tiles = {rows for at in met for rows in tile_sizes(at, how)}
        return how.product_bytes * min(PRODUCTS, PRODUCTS_A_TILE * len(tiles))
    return how.product_bytes * min(PRODUCTS, PRODUCTS_A_SIZE * len({at.tokens for at in met}))


def tile_sizes(at: Layout, how: How) -> set[int]:
    """Rows of the head's tiles: the full ones', and the last one's."""
    full, rest = divmod(at.loss_tokens, how.tile)
    return ({how.tile} if full else set()) | ({rest} if rest else set())


def settled(said: Forecast, resident: int, products: int, peak: int) -> Forecast:
    """A forecast after a trial of some micro-batches in this very process.

    resident: what was there once the trial's model and tensors were gone: code, rows, compiled products.
    products: what those of sizes still to come will take.
    peak:     of the trial, which had neither moments nor copies for a checkpoint; no training has less.
    """
    found = replace(said, process=resident, rows=0, products=products)
    missing = peak + said.optimiser + said.checkpoint - found.total
    return replace(found, slack=found.slack + max(0, missing))


def weights_bytes(shape: Shape) -> int:
    """The base as training holds it. A mapped file stays in memory beside what was stacked out of it."""
    plain = shape.parameters * shape.weight_bytes
    if not shape.mapped:
        return plain
    return plain + shape.layers * shape.weight_bytes * sum(
        stack.inputs * stack.outputs for stack in shape.stacks if stack.joined
    )


def smaller(shape: Shape, layers: int) -> Shape:
    """The same model with fewer layers."""
    share = layers / shape.layers
    kept = shape.parameters - round(shape.blocks * (1 - share))
    return replace(shape, layers=layers, parameters=kept, trainable=round(shape.trainable * share))
