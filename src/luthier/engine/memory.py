"""How many bytes training takes, by kind, before it takes them; and how many it took.

Sources: the shapes in the model's configuration; per token of a micro-batch, what `engine.fused` and
`engine.attention` keep of one decoder layer with low-rank adapters on a frozen base; Adam's two moments
(Kingma & Ba 2015, arXiv 1412.6980).
Peaks are read from the kernel (`VmHWM`, proc(5)).

`FRAGMENTATION` is the coarsest term. Micro-batches differ in size from step to step, so freed blocks seldom
fit the next tensor and glibc keeps them; and the matrix library keeps a compiled product for each shape it
met (docs/LOG.md, 2026-11-22), which was taken for the heap's doing when this factor was set. It has not been
fitted again since.

It does not know gradient checkpointing, experts or GPUs.
"""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.engine.documents import SHORT

FRAGMENTATION = 0.9  # of the activations: what is kept beside them and cannot be used for them
SLACK = 0.03  # of everything else: allocator rounding, thread buffers of the matrix library
PROCESS_BYTES = 550_000_000  # Python with torch, transformers and PEFT loaded, before any weight
FLOAT32 = 4
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that memory depends on."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    inner: int
    vocabulary: int
    parameters: int
    weight_bytes: int

    @staticmethod
    def of(config: Any, parameters: int, weight_bytes: int) -> Shape:
        text = config.get_text_config()
        heads = text.num_attention_heads
        return Shape(
            layers=text.num_hidden_layers, width=text.hidden_size, heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_width=getattr(text, "head_dim", None) or text.hidden_size // heads,
            inner=text.intermediate_size, vocabulary=text.vocab_size,
            parameters=parameters, weight_bytes=weight_bytes,
        )  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Predicted bytes of a training process at its peak, by kind."""

    process: int
    weights: int
    adapters: int
    gradients: int
    optimiser: int
    activations: int
    fragmentation: int
    head: int
    checkpoint: int
    slack: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


def token_bytes(shape: Shape, longest: int) -> int:
    """What one token of a micro-batch keeps alive from the forward to the backward pass."""
    d, ff, c = shape.width, shape.inner, shape.weight_bytes
    q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 2 * (c * d + c * d + FLOAT32)  # each: its input, its output, one scale
    attention = c * (2 * q + 2 * kv)  # q, k, v as they were multiplied, and the output
    weights = c * shape.heads * longest if longest <= SHORT else 0  # probabilities of short documents
    return shape.layers * (norms + attention + weights + c * 2 * ff)  # gate and up


def transient_bytes(shape: Shape, longest: int) -> int:
    """What one token needs on top, for a moment, in the widest layer's backward pass."""
    gated = shape.weight_bytes * 4 * shape.inner  # the hidden layer, its gradient, that of gate and up
    scores = shape.heads * longest * (FLOAT32 + 2 * shape.weight_bytes)
    return max(gated, scores) + 4 * shape.weight_bytes * shape.width


def forecast(shape: Shape, trainable: int, tokens: tuple[int, int], loss_rows: int) -> Forecast:
    """The peak of a training process.

    tokens:    of the largest micro-batch, and of the longest document.
    loss_rows: how many rows of logits are alive at once.
    """
    adapters = FLOAT32 * trainable
    micro_tokens, longest = tokens
    activations = micro_tokens * (token_bytes(shape, longest) + transient_bytes(shape, longest))
    known = {
        "process": PROCESS_BYTES,
        "weights": shape.parameters * shape.weight_bytes,
        "adapters": adapters,
        "gradients": adapters,
        "optimiser": 2 * adapters,
        "activations": activations,
        "fragmentation": round(FRAGMENTATION * activations),
        "head": loss_rows * shape.vocabulary * (2 * FLOAT32 + shape.weight_bytes),
        "checkpoint": 4 * adapters,  # a copy of weights and moments, and the best weights
    }
    return Forecast(**known, slack=round(SLACK * sum(known.values())))


def release() -> None:
    """Give back what is no longer used, so that what follows starts from a clean heap (glibc only)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def hold() -> None:
    """From now on keep freed memory for the next tensor (glibc only).

    Given back to the kernel, every large tensor would be touched for the first time again, page by page: a
    fifth of a training step. `release` still gives it back.
    """
    with suppress(OSError, AttributeError):
        heap = ctypes.CDLL(None)
        heap.mallopt(_M_MMAP_MAX, 0)
        heap.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        heap.mallopt(_M_TOP_PAD, 64 * 2**20)


def forget_peak() -> bool:
    """Start a new peak here (Linux, own process); false where the kernel does not allow it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_rss_bytes() -> int:
    """The most resident memory since `forget_peak`, or since the process began."""
    return status().get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def rss_bytes() -> int:
    return status().get("VmRSS", 0)


def status() -> Mapping[str, int]:
    """The `Vm…` lines of this process, in bytes."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.startswith("Vm"):
                found[name] = int(rest.split()[0]) * 1024
    return found
