"""The arithmetic of growing answers: products of few tokens with many adapters, and attention over pages.

On a CPU with AVX2 or AVX512-BF16 `decode.cpp` does both, compiled as `engine.native` compiles its own; what
it does not take (another number type or device, no compiler) goes to torch: the same result up to rounding.
Where the CPU has matrix units (AMX), products of more than `FEW` tokens are torch's, which uses them.

It does not know modules, requests or which block of the cache is whose.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from luthier.engine import native
from luthier.inference.pages import BLOCK

SOURCE = Path(__file__).with_name("decode.cpp")
FEW = 32
PAGES = {torch.bfloat16: "attend_bfloat16", torch.float32: "attend_float32"}


@dataclass(frozen=True)
class Low:
    """One adapter's part of a group of layers: A of all of them (P · R, E), scaled B side by side (R, O)."""

    a_PR_E: Tensor
    b_R_O: Tensor

    @property
    def rank(self) -> int:
        return len(self.b_R_O)


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a step under one adapter; slot 0 is the bare base."""

    slot: int
    start: int
    stop: int


class Lows:
    """The adapters of one group by their slot, for torch as tensors and for the C++ as addresses."""

    def __init__(self, slots: int, ends: Sequence[int]) -> None:
        self.ends = tuple(ends)
        self.by_slot: dict[int, Low] = {}
        self.a_S, self.b_S, self.ranks_S = (torch.zeros(slots, dtype=torch.int64) for _ in range(3))
        self.ends_P = torch.tensor(self.ends, dtype=torch.int64)

    def put(self, slot: int, low: Low | None) -> None:
        self.by_slot.pop(slot, None)
        if low is not None:
            self.by_slot[slot] = low
        self.a_S[slot] = 0 if low is None else low.a_PR_E.data_ptr()
        self.b_S[slot] = 0 if low is None else low.b_R_O.data_ptr()
        self.ranks_S[slot] = 0 if low is None else low.rank

    @property
    def widest(self) -> int:
        return len(self.ends) * max((low.rank for low in self.by_slot.values()), default=0)


def product(
    x_T_E: Tensor,
    weights: tuple[Tensor, Tensor | None],
    lows: Lows | None,
    at: Sequence[Segment],
    slots_T: Tensor | None,
) -> Tensor:
    """W x + b, and each token's own s B A x: (T, O). `weights` are W (O, E) and b (O)."""
    weight_O_E, bias_O = weights
    if lows is not None and not any(segment.slot in lows.by_slot for segment in at):
        lows = None
    if _fast(x_T_E, weight_O_E) and (lows is None or all(end % 16 == 0 for end in lows.ends)):
        out_T_O = x_T_E.new_empty(len(x_T_E), len(weight_O_E))
        _product("product_bfloat16", x_T_E, (weight_O_E, bias_O), out_T_O, lows, slots_T)
        return out_T_O
    if lows is None:
        return linear(x_T_E, weight_O_E, bias_O)
    out_T_O = x_T_E.new_zeros(len(x_T_E), len(weight_O_E))
    for segment in at:
        low = lows.by_slot.get(segment.slot)
        if low is None:
            continue
        part = slice(segment.start, segment.stop)
        z_T_PR = x_T_E[part] @ low.a_PR_E.T
        for number, (start, end) in enumerate(zip((0, *lows.ends), lows.ends, strict=False)):
            z_T_R = z_T_PR[:, number * low.rank :][:, : low.rank]
            out_T_O[part, start:end] = z_T_R @ low.b_R_O[:, start:end]
    out_T_O.addmm_(x_T_E, weight_O_E.T)
    return out_T_O if bias_O is None else out_T_O.add_(bias_O)


def logits(x_B_E: Tensor, weight_V_E: Tensor) -> Tensor:
    """Float32 logits (B, V)."""
    if not _fast(x_B_E, weight_V_E):
        return linear(x_B_E, weight_V_E).float()
    out_B_V = torch.empty(len(x_B_E), len(weight_V_E))
    _product("product_float32", x_B_E, (weight_V_E, None), out_B_V, None, None)
    return out_B_V


def _fast(x_T_E: Tensor, weight_O_E: Tensor) -> bool:
    return (
        x_T_E.dtype is torch.bfloat16
        and x_T_E.is_cpu
        and weight_O_E.dtype is torch.bfloat16
        and weight_O_E.is_contiguous()
        and x_T_E.is_contiguous()
        and x_T_E.shape[1] % 32 == 0
        and has_product()
        and (len(x_T_E) <= FEW or not _has_matrix_units())
    )


def _product(
    name: str,
    x_T_E: Tensor,
    weights: tuple[Tensor, Tensor | None],
    out_T_O: Tensor,
    lows: Lows | None,
    slots_T: Tensor | None,
) -> None:
    weight_O_E, bias_O = weights
    shape = (*map(ctypes.c_long, (*x_T_E.shape, len(weight_O_E))),)
    if lows is None:
        own: tuple[Any, ...] = (None,) * 5 + (ctypes.c_long(0), ctypes.c_long(0), None)
    else:
        z_T_PR = torch.empty(len(x_T_E), lows.widest)
        tables = (lows.a_S, lows.b_S, lows.ranks_S, slots_T, lows.ends_P)
        own = (
            *map(_address, tables),
            ctypes.c_long(len(lows.ends)),
            ctypes.c_long(lows.widest),
            _address(z_T_PR),
        )
    getattr(_library(), name)(
        _address(x_T_E), _address(weight_O_E), _address(bias_O), _address(out_T_O), *shape, *own
    )


def _address(tensor: Tensor | None) -> ctypes.c_void_p | None:
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


@dataclass(frozen=True)
class Reach:
    """What each of a step's tokens (T) sees of the cache: the first places of its own sequence.

    table_S_N: the blocks of each sequence in the step, 0 behind the last.
    lines_T:   the token's line in the table.
    lengths_T: how many places it sees, its own the last.
    """

    table_S_N: Tensor
    lines_T: Tensor
    lengths_T: Tensor


@dataclass(frozen=True)
class Laid:
    """How a step's tokens (T) lie, those of a sequence beside each other.

    positions_T, places_T: their place in their own sequence, and in the cache.
    slots_T, segments:     the adapter of each, and the same as runs.
    reach:                 what each of them sees.
    """

    positions_T: Tensor
    places_T: Tensor
    slots_T: Tensor
    segments: tuple[Segment, ...]
    reach: Reach


@dataclass(frozen=True)
class Sight:
    """What a layer's attention is: how far back it sees, what multiplies its scores."""

    window: int | None
    scale: float


Held = tuple[Tensor, Tensor]  # one layer's keys and values, (places, key heads, width)


def attend(q_THE: Tensor, held: Held, reach: Reach, sight: Sight) -> Tensor:
    """Attention of every token over what its sequence has read, itself included: (T, heads, width)."""
    keys, values = held
    tokens, heads, width = q_THE.shape
    name = PAGES.get(q_THE.dtype)
    if name is None or not q_THE.is_cpu or not native.can_compile():
        return _attend(q_THE, held, reach, sight)
    q_THE = q_THE.contiguous()
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype)
    where = (q_THE, keys, values, reach.table_S_N, reach.lines_T, reach.lengths_T, out_THE)
    numbers = (tokens, heads, keys.shape[1], width, reach.table_S_N.shape[1], sight.window or 0)
    getattr(_library(), name)(
        *map(_address, where), *map(ctypes.c_long, numbers), ctypes.c_float(sight.scale)
    )
    return out_THE


def _attend(q_THE: Tensor, held: Held, reach: Reach, sight: Sight) -> Tensor:
    """The same in torch, a sequence at a time."""
    out_THE = torch.empty(q_THE.shape, dtype=q_THE.dtype, device=q_THE.device)
    for line in sorted(set(reach.lines_T.tolist())):
        mine_t = (reach.lines_T == line).nonzero()[:, 0]
        lengths_t = reach.lengths_T[mine_t]
        places_R = torch.arange(int(lengths_t.max()))
        hidden_t_R = places_R >= lengths_t[:, None]
        if sight.window:
            hidden_t_R |= places_R < lengths_t[:, None] - sight.window
        places_R = reach.table_S_N[line].long()[places_R // BLOCK] * BLOCK + places_R % BLOCK
        k_KRE, v_KRE = (x.index_select(0, places_R.to(x.device)).transpose(0, 1) for x in held)
        q_KGtE = q_THE[mine_t].view(len(mine_t), len(k_KRE), -1, q_THE.shape[-1]).permute(1, 2, 0, 3)
        scores_KGtR = (q_KGtE @ k_KRE[:, None].transpose(2, 3)).float() * sight.scale
        scores_KGtR.masked_fill_(hidden_t_R.to(scores_KGtR.device), -torch.inf)
        mixed_KGtE = torch.softmax(scores_KGtR, -1).to(q_THE.dtype) @ v_KRE[:, None]
        out_THE[mine_t] = mixed_KGtE.permute(2, 0, 1, 3).reshape(len(mine_t), *q_THE.shape[1:])
    return out_THE


def largest(x_B_V: Tensor) -> list[int]:
    """Where the largest number of each row stands; of several the first."""
    if (
        x_B_V.dtype is not torch.float32
        or not x_B_V.is_cpu
        or not x_B_V.is_contiguous()
        or not native.can_compile()
    ):
        found: list[int] = x_B_V.argmax(-1).tolist()
        return found
    out_B = torch.empty(len(x_B_V), dtype=torch.int64)
    _library().largest_float32(_address(x_B_V), _address(out_B), *map(ctypes.c_long, x_B_V.shape))
    return list(out_B.tolist())


@cache
def has_product() -> bool:
    """Whether the C++ is here, and knows this CPU's instructions (`lanes.h`)."""
    return native.can_compile() and bool(_library().has_product())


@cache
def _has_matrix_units() -> bool:
    return "amx_bf16" in native.cpu_flags()


def _library() -> ctypes.CDLL:
    return native.build(SOURCE)
