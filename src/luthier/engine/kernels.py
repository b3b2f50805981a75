"""The elementwise formulas of a decoder layer and their gradients, each a function of whole tensors.

Sources: RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467); gated linear units (Shazeer 2020, arXiv
2002.05202); rotary positions (Su et al. 2021, arXiv 2104.09864); the softmax of attention scores. Run as
they stand they are a handful of torch calls; compiled (torch.compile), each is one pass over memory.
Statistics are float32 whatever comes in. Compiling changes no formula, but it skips roundings in between, so
bits may differ from the uncompiled run: a run uses one or the other to its end.

It does not know modules or adapters.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """The formulas, compiled or as they stand."""

    norm: Kernel
    norm_backward: Kernel
    gate: dict[str, Kernel]
    gate_backward: dict[str, Kernel]
    soften: Kernel
    soften_backward: Kernel
    turn: Kernel
    unturn: Kernel


def norm(x_T_E: Tensor, weight_E: Tensor, eps: float, shift: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x)) · (weight + shift) and 1 / rms as (T, 1); `shift` is 1 where weights count from 1."""
    wide = x_T_E.float()
    scale_T = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale_T * (weight_E.float() + shift)).to(x_T_E.dtype), scale_T


def norm_backward(grad_T_E: Tensor, x_T_E: Tensor, weight_E: Tensor, scale_T: Tensor, shift: float) -> Tensor:
    slope = grad_T_E.float() * (weight_E.float() + shift)
    unit = x_T_E.float() * scale_T
    return ((slope - unit * (slope * unit).mean(-1, keepdim=True)) * scale_T).to(x_T_E.dtype)


def _gate(activation: Kernel) -> Kernel:
    def forward(both_T_2F: Tensor) -> Tensor:
        """activation(gate) · up, from (gate, up) side by side."""
        gate, up = both_T_2F.chunk(2, dim=-1)
        out: Tensor = activation(gate) * up
        return out

    return forward


def _gate_backward(activation: Kernel, slope: Kernel) -> Kernel:
    def backward(grad_T_F: Tensor, both_T_2F: Tensor) -> tuple[Tensor, Tensor]:
        """The forward's output once more, and the gradient of (gate, up) side by side."""
        gate, up = both_T_2F.chunk(2, dim=-1)
        lit = activation(gate)
        return lit * up, torch.cat((slope(grad_T_F * up, gate), grad_T_F * lit), dim=-1)

    return backward


def soften(scores_NGLR: Tensor, bias_LR: Tensor, scale: float) -> Tensor:
    """softmax(scale · scores + bias) over the last axis; the bias is -inf where a key is hidden."""
    wide = scores_NGLR.float() * scale + bias_LR
    risen = (wide - wide.amax(-1, keepdim=True)).exp()
    return (risen / risen.sum(-1, keepdim=True)).to(scores_NGLR.dtype)


def soften_backward(grad: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The gradient of the scores from that of the weights; where a weight is 0, so is the gradient."""
    slope, wide = grad.float(), weights.float()
    return ((slope - (slope * wide).sum(-1, keepdim=True)) * wide * scale).to(weights.dtype)


def turn(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotary positions: pairs (i, i + R / 2) of the first R features turn by their position's angle."""
    half = cos_TR.shape[-1] // 2
    low, high, rest = x_THE[..., :half].float(), x_THE[..., half : 2 * half].float(), x_THE[..., 2 * half :]
    cos_T1R, sin_T1R = cos_TR[:, None].float(), sin_TR[:, None].float()
    first = low * cos_T1R[..., :half] - high * sin_T1R[..., :half]
    second = high * cos_T1R[..., half:] + low * sin_T1R[..., half:]
    return torch.cat((first.to(x_THE.dtype), second.to(x_THE.dtype), rest), dim=-1)


def unturn(grad_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """The gradient of `turn`'s input: its transpose."""
    half = cos_TR.shape[-1] // 2
    low, high = grad_THE[..., :half].float(), grad_THE[..., half : 2 * half].float()
    cos_T1R, sin_T1R = cos_TR[:, None].float(), sin_TR[:, None].float()
    first = low * cos_T1R[..., :half] + high * sin_T1R[..., half:]
    second = high * cos_T1R[..., half:] - low * sin_T1R[..., :half]
    dtype = grad_THE.dtype
    return torch.cat((first.to(dtype), second.to(dtype), grad_THE[..., 2 * half :]), dim=-1)


def _tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _tanh_gelu_slope(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, tuple[Kernel, Kernel]] = {
    "silu": (silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (_tanh_gelu, _tanh_gelu_slope),
}


@cache
def kernels(compiled: bool) -> Kernels:
    """Compiled ones take tens of seconds the first time they meet a kind of tensor."""

    def ready(formula: Kernel) -> Kernel:
        return torch.compile(formula, dynamic=True) if compiled else formula

    if compiled:  # past the limit torch falls back to uncompiled code without a word, and bits would change
        torch._dynamo.config.recompile_limit = 256

    return Kernels(
        norm=ready(norm),
        norm_backward=ready(norm_backward),
        gate={name: _gate(forward) for name, (forward, _) in ACTIVATIONS.items()},  # torch's own are faster
        gate_backward={name: ready(_gate_backward(*pair)) for name, pair in ACTIVATIONS.items()},
        soften=ready(soften),
        soften_backward=ready(soften_backward),
        turn=ready(turn),
        unturn=ready(unturn),
    )


def can_compile() -> bool:
    """Whether a C++ compiler is at hand; without one the formulas run as they stand."""
    return any(shutil.which(name) for name in ("g++", "clang++"))
