"""How many bytes training takes, by kind, before it takes them; and how many it took.

Sources: the shapes in the model's configuration; per token of a micro-batch, what autograd keeps of one
decoder layer with low-rank adapters on a frozen base (counted from transformers' layer and PEFT's forward,
which keeps a float32 copy of every adapted linear's input); Adam's two moments (Kingma & Ba 2015).
Peaks are read from the kernel (`VmHWM`, proc(5)).

The heap is the coarsest term: micro-batches differ in size from step to step, so freed blocks seldom fit the
next tensor, and glibc keeps them. Measured on a 135M model: 1.5 to 2.1 times the bytes that are really held
(handing them back costs more in page faults than it is worth). Steps of equal size fragment far less.

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

FRAGMENTATION = 0.9  # of the activations: freed blocks that the heap keeps but cannot use again
SLACK = 0.03  # of everything else: allocator rounding, thread buffers of the matrix library
PROCESS_BYTES = 550_000_000  # Python with torch, transformers and PEFT loaded, before any weight
FLOAT32 = 4


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


def token_bytes(shape: Shape) -> int:
    """What one token of a micro-batch keeps alive from the forward to the backward pass."""
    d, ff, c = shape.width, shape.inner, shape.weight_bytes
    q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    norms = 2 * (FLOAT32 * d + c * d)  # each: its float32 input, its normalised output
    inputs = FLOAT32 * (5 * d + q + ff)  # float32 inputs of q, k, v, gate, up; of o; of down
    attention = c * (2 * q + 2 * kv)  # q, k, v and the output
    gated = c * 3 * ff  # gate, up, and their activation
    return shape.layers * (norms + inputs + attention + gated)


def transient_bytes(shape: Shape) -> int:
    """What one token needs on top, for a moment, in the widest layer's backward pass."""
    return FLOAT32 * (3 * shape.inner + 4 * shape.width)


def forecast(shape: Shape, trainable: int, micro_tokens: int, loss_rows: int) -> Forecast:
    """The peak of a training process; `loss_rows` is how many rows of logits are alive at once."""
    adapters = FLOAT32 * trainable
    activations = micro_tokens * (token_bytes(shape) + transient_bytes(shape))
    known = {
        "process": PROCESS_BYTES,
        "weights": shape.parameters * shape.weight_bytes,
        "adapters": adapters,
        "gradients": adapters,
        "optimiser": 2 * adapters,
        "activations": activations,
        "fragmentation": round(FRAGMENTATION * activations),
        "head": loss_rows * shape.vocabulary * (2 * FLOAT32 + shape.weight_bytes),
        "checkpoint": 7 * adapters,  # a copy of weights and moments, its file's bytes, and the best weights
    }
    return Forecast(**known, slack=round(SLACK * sum(known.values())))


def release() -> None:
    """Give back what is no longer used, so that what follows starts from a clean heap (glibc only)."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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
