"""Attention over documents in C++, forward and back, with scores that never leave the cache (`flash.cpp`).

Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691). What is kept for the way back is what came in, what
went out, and one number for each query: the logarithm of its scores' sum. Work is cut into units
(`engine.units`), each from end to end one thread's, so bits do not depend on the number of threads.

For bfloat16 on a CPU that multiplies it and has no matrix unit, and for float32 on one with AVX2 or AVX-512.
It does not know dropout, caches, soft caps or sinks, nor heads whose width is no multiple of sixteen.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.engine import native
from luthier.engine.units import Units

SOURCE = Path(__file__).with_name("flash.cpp")
NUMBERS = {
    torch.bfloat16: "bf16",
    torch.float32: "float",
}  # what C++ calls them; each is a library of its own
Qkv = tuple[Tensor, Tensor, Tensor]  # (T, heads, width), and keys and values (T, key heads, width)
Turn = tuple[Tensor, Tensor]  # rotary cos and sin, each (T, rotated width)


class Sight(NamedTuple):
    """How many keys a query sees at most, itself the last of them, and what multiplies its scores."""

    window: int | None
    scale: float


def takes(q_THE: Tensor, turn: Turn | None) -> bool:
    """Whether there are instructions here for such queries and tables."""
    alike = turn is None or turn[0].dtype is q_THE.dtype
    return q_THE.is_cpu and len(q_THE) > 0 and alike and knows(q_THE.dtype, q_THE.shape[2])


@cache
def knows(dtype: torch.dtype, width: int) -> bool:
    """Whether this CPU has instructions for heads of this width and number type, and no better way."""
    if width % 16:
        return False
    if dtype is torch.bfloat16:
        return native.multiplies()
    return dtype is torch.float32 and native.can_compile() and bool(_library(dtype).flash_has())


def attention(qkv: Qkv, turn: Turn | None, laid: Units, sight: Sight) -> Tensor:
    """softmax(scale · Q Kᵀ) V of each document over its path and itself: (T, heads, width).

    `turn`: rotary tables of the queries' own number type, if queries and keys are still to turn.
    """
    out: Tensor = _Flash.apply(*qkv, (turn, laid, sight))  # type: ignore[no-untyped-call]
    return out


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: tuple[Turn | None, Units, Sight]) -> Tensor:
        turn, laid, sight = at
        if len({x.untyped_storage().data_ptr() for x in (q, k, v)}) > 1:
            q, k, v = (x.contiguous() for x in (q, k, v))  # a part would keep alive what it was cut from
        q, k, v = map(_rows, (q, k, v))
        turn = None if turn is None else (turn[0].contiguous(), turn[1].contiguous())
        out, total = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        job = _job((q, k, v), (turn, laid, sight), out=out, total=total)
        _library(q.dtype).flash_there(ctypes.byref(job))
        ctx.save_for_backward(q, k, v, out, total, *(turn or ()))
        ctx.laid, ctx.sight = laid, sight
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total, *turn = ctx.saved_tensors
        found = [x.new_empty(x.shape) for x in (q, k, v)]
        sums = q.new_empty((k.shape[1], ctx.laid.slots, 2, k.shape[2]), dtype=torch.float32)
        at = (turn[0], turn[1]) if turn else None, ctx.laid, ctx.sight
        given = {"grad": grad.contiguous(), "q_grad": found[0], "k_grad": found[1], "v_grad": found[2]}
        job = _job((q, k, v), at, out=out, total=total, sums=sums, **given)
        _library(q.dtype).flash_back(ctypes.byref(job))
        return *found, None


def _rows(x: Tensor) -> Tensor:
    """Each token's features side by side; tokens may lie apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


_POINTERS = ("q", "k", "v", "cosine", "sine", "out", "total", "grad", "q_grad", "k_grad", "v_grad", "sums")
_TABLES = ("units", "path", "pieces", "documents", "owed")
_COUNTS = ("q_row", "k_row", "v_row", "turned", "tokens", "heads", "kv_heads", "width", "window")


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, *_TABLES)),
        *((name, ctypes.c_int64) for name in (*_COUNTS, "count", "document_count", "slots")),
        ("scale", ctypes.c_double),
    ]  # fmt: skip


def _job(qkv: Qkv, at: tuple[Turn | None, Units, Sight], **more: Tensor) -> _Job:
    (q, k, v), (turn, laid, sight) = qkv, at
    if turn is not None:
        more = {"cosine": turn[0], "sine": turn[1], **more}
    tensors = {"q": q, "k": k, "v": v, **{name: getattr(laid, name) for name in _TABLES}, **more}
    return _Job(
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
        q_row=q.stride(0), k_row=k.stride(0), v_row=v.stride(0), tokens=len(q),
        turned=0 if turn is None else turn[0].shape[1],
        heads=q.shape[1], kv_heads=k.shape[1], width=q.shape[2], window=sight.window or 0,
        count=len(laid.units), document_count=len(laid.documents), slots=laid.slots, scale=sight.scale,
    )  # fmt: skip


def _library(dtype: torch.dtype) -> ctypes.CDLL:
    return native.build(SOURCE, f"-DNUMBER={NUMBERS[dtype]}")
