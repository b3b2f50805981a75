"""Attention over documents laid end to end through torch's own kernels, which on a GPU take all in one call.

Sources: FlashAttention-2 (Dao 2023, arXiv 2307.08691), whose variable-length call takes the documents' ends
as cumulative sums and lines a causal mask up with the last key, which is what a document that follows
another one needs: its keys are the path's and its own. Either the flash-attn package's function or torch's
own `varlen_attn`; the first that gives the answer of `by_document` on a trial is used, and where there is
none, `by_document` itself: torch's scaled_dot_product_attention for each document.

The layout of a batch is built and moved once and found again by every layer. It does not know caches, soft
caps or sinks, nor when a CPU comes here (`engine.attention`). Never run on a GPU yet: of what is here, tests
hold only what runs without one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from luthier.engine.kernels import Kernel

Qkv = tuple[Tensor, Tensor, Tensor]  # (T, heads, width), and keys and values (T, key heads, width)
TRIAL = (5, 3, 7), (-1, 0, -1)  # lengths and parents of the documents that a kernel is tried on
TOLERANCE = 4e-2  # of the largest entry: bf16 rounding; a wrong mask differs by far more


@dataclass(frozen=True)
class Layout:
    """Where queries and keys of each document lie. `keys_K` is None where every document sees only itself.

    ends_q, ends_k: 0 and the cumulative tokens of queries and keys, int32, on the device.
    keys_K:         the token that each key is: a document's path, then itself, then the next document's.
    lengths:        (queries, keys) of each document; `longest` their maxima.
    """

    ends_q: Tensor
    ends_k: Tensor
    keys_K: Tensor | None
    lengths: tuple[tuple[int, int], ...]
    longest: tuple[int, int]


@dataclass(frozen=True)
class Sight:
    """How far back a query sees (itself and window - 1 tokens before it), and what multiplies its scores."""

    window: int | None
    scale: float
    dropout: float = 0.0


Run = Callable[[Qkv, Layout, Sight], Tensor]


@lru_cache(maxsize=8)
def layout(lengths_D: tuple[int, ...], parents_D: tuple[int, ...], device: torch.device) -> Layout:
    """The layout of documents that follow `parents_D` (-1 or empty: none); once a batch, for all layers."""
    starts = (0, *accumulate(lengths_D))
    paths: list[tuple[int, ...]] = []
    for number, parent in enumerate(parents_D or (-1,) * len(lengths_D)):
        paths.append((*(paths[parent] if parent >= 0 else ()), number))
    keys = [sum(lengths_D[at] for at in path) for path in paths]
    ends_q = torch.tensor(starts, dtype=torch.int32).to(device)
    lengths = tuple(zip(lengths_D, keys, strict=True))
    longest = max(lengths_D), max(keys)
    if max(parents_D, default=-1) < 0:
        return Layout(ends_q, ends_q, None, lengths, longest)
    seen = [torch.arange(starts[at], starts[at + 1]) for path in paths for at in path]
    ends_k = torch.tensor((0, *accumulate(keys)), dtype=torch.int32)
    return Layout(ends_q, ends_k.to(device), torch.cat(seen).to(device), lengths, longest)


def over_documents(qkv: Qkv, laid: Layout, sight: Sight) -> Tensor:
    """Attention of each document over its path and itself: (T, heads, width)."""
    q_THE, k_TKE, v_TKE = qkv
    if laid.keys_K is not None:
        k_TKE, v_TKE = (x.index_select(0, laid.keys_K) for x in (k_TKE, v_TKE))
    _, run = kernel(q_THE.device, q_THE.dtype, q_THE.shape[-1], bool(sight.dropout))
    return run((q_THE, k_TKE, v_TKE), laid, sight)


def turned(x_THE: Tensor, turn: tuple[Tensor, Tensor], formulas: tuple[Kernel, Kernel]) -> Tensor:
    """Rotary positions by a formula and its gradient, each one pass where it is compiled."""
    out: Tensor = _Turned.apply(x_THE, *turn, formulas)  # type: ignore[no-untyped-call]
    return out


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor, formulas: tuple[Kernel, Kernel]
    ) -> Tensor:
        ctx.save_for_backward(cos_TR, sin_TR)
        forward, ctx.way_back = formulas
        out: Tensor = forward(x_THE, cos_TR, sin_TR)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.way_back(grad_THE, *ctx.saved_tensors), None, None, None


@cache
def kernel(device: torch.device, dtype: torch.dtype, width: int, dropout: bool = False) -> tuple[str, Run]:
    """The fastest way that gives the right answer here, and its name."""
    if device.type == "cuda" and not dropout and dtype in (torch.bfloat16, torch.float16):
        for name, find in (("flash-attn", _flash_attn), ("torch varlen_attn", _torch_varlen)):
            run = find()
            if run is not None and _right(run, device, dtype, width):
                return name, run
    return "scaled_dot_product_attention by document", by_document


def by_document(qkv: Qkv, laid: Layout, sight: Sight) -> Tensor:
    """The same, a document at a time."""
    found: list[Tensor] = []
    at_q = at_k = 0
    for queries, keys in laid.lengths:
        q_HLE = qkv[0][at_q : at_q + queries].transpose(0, 1)
        k_KSE, v_KSE = (x[at_k : at_k + keys].transpose(0, 1) for x in qkv[1:])
        masked = queries != keys or (sight.window is not None and sight.window < keys)
        out_HLE = scaled_dot_product_attention(
            q_HLE[None], k_KSE[None], v_KSE[None],
            attn_mask=_seen(queries, keys, sight.window, q_HLE.device) if masked else None,
            dropout_p=sight.dropout, is_causal=not masked, scale=sight.scale,
            enable_gqa=len(q_HLE) != len(k_KSE),
        )[0]  # fmt: skip
        found.append(out_HLE.transpose(0, 1))
        at_q, at_k = at_q + queries, at_k + keys
    return torch.cat(found)


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query (row) sees a key (column); the last query sees the last key."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


def _flash_attn() -> Run | None:
    try:
        from flash_attn import flash_attn_varlen_func as call  # type: ignore[import-not-found]
    except ImportError:
        return None

    def run(qkv: Qkv, laid: Layout, sight: Sight) -> Tensor:
        back = -1 if sight.window is None else sight.window - 1
        out_THE: Tensor = call(
            *qkv, laid.ends_q, laid.ends_k, *laid.longest,
            softmax_scale=sight.scale, causal=True, window_size=(back, 0 if back >= 0 else -1),
        )  # fmt: skip
        return out_THE

    return run


def _torch_varlen() -> Run | None:
    try:
        from torch.nn.attention.varlen import varlen_attn as call
    except ImportError:
        return None

    def run(qkv: Qkv, laid: Layout, sight: Sight) -> Tensor:
        back = -1 if sight.window is None else sight.window - 1
        out = call(
            *qkv, laid.ends_q, laid.ends_k, *laid.longest,
            scale=sight.scale, window_size=(back, 0), enable_gqa=qkv[0].shape[1] != qkv[1].shape[1],
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    return run


def _right(run: Run, device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel gives the answer and the gradients of `by_document`, with paths and windows too."""
    noise = torch.Generator().manual_seed(0)
    for parents, window in (((), None), (TRIAL[1], None), (TRIAL[1], 4)):
        laid, sight = layout(TRIAL[0], parents, device), Sight(window, width**-0.5)
        keys = sum(count for _, count in laid.lengths)
        drawn = [torch.randn(n, h, width, generator=noise) for n, h in ((15, 4), (keys, 2), (keys, 2))]
        inputs = [x.to(device, dtype).requires_grad_() for x in drawn]
        try:
            with torch.enable_grad():
                pairs = [_answers(one, inputs, laid, sight) for one in (run, by_document)]
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return False  # it is not for this machine, number type or width
        for found, expected in zip(*pairs, strict=True):
            if float((found - expected).abs().max()) > TOLERANCE * float(expected.abs().max()):
                return False
    return True


def _answers(run: Run, inputs: Sequence[Tensor], laid: Layout, sight: Sight) -> list[Tensor]:
    q, k, v = inputs
    out_THE = run((q, k, v), laid, sight)
    upstream = torch.linspace(-1.0, 1.0, out_THE.numel(), device=out_THE.device).view_as(out_THE)
    grads = torch.autograd.grad((out_THE.float() * upstream).sum(), inputs)
    return [x.detach().float() for x in (out_THE, *grads)]
