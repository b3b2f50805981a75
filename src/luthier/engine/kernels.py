"""The elementwise formulas of a decoder layer and their gradients, each a function of whole tensors.

Sources: RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467); gated linear units (Shazeer 2020, arXiv
2002.05202); rotary positions (Su et al. 2021, arXiv 2104.09864); the softmax of attention scores. Here they
are a handful of torch calls each, for any device; `engine.native` has most of them as one pass over memory of
a CPU. Statistics are float32 whatever comes in. What a formula is given may be overwritten
where it says so.

It does not know modules or adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

Kernel = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """The formulas, as they stand here or another way."""

    norm: Kernel
    norm_backward: Kernel
    gate: dict[str, Kernel]
    gate_backward: dict[str, Kernel]
    soften: Kernel
    soften_backward: Kernel
    turn: Kernel
    unturn: Kernel
    settle: Kernel
    total: Kernel
    outer: Kernel
    flash: bool = False  # whether attention may go through `engine.flash`


@dataclass(frozen=True)
class Seen:
    """Which keys a query sees: itself and all before it, or the last `window` of these.

    Queries come in rounds of `length`; ahead of the first one's own key there are `before` others.
    """

    length: int
    before: int = 0
    window: int | None = None

    def hidden(self, reach: int, device: torch.device | None = None) -> Tensor:
        """(length, reach): True where a query (row) must not see a key (column)."""
        place = torch.arange(self.before, self.before + self.length, device=device)
        behind = place[:, None] - torch.arange(reach, device=device)[None, :]
        return (behind < 0) if self.window is None else (behind < 0) | (behind >= self.window)


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


def soften(scores_NMR: Tensor, seen: Seen, scale: float) -> Tensor:
    """softmax(scale · scores) over the keys that each query sees, 0 elsewhere. May overwrite the scores."""
    scores_NGLR = scores_NMR.view(len(scores_NMR), -1, seen.length, scores_NMR.shape[-1]).float() * scale
    scores_NGLR.masked_fill_(seen.hidden(scores_NMR.shape[-1], scores_NMR.device), -torch.inf)
    return torch.softmax(scores_NGLR, -1).to(scores_NMR.dtype).view_as(scores_NMR)


def soften_backward(grad: Tensor, weights: Tensor, seen: Seen, scale: float) -> Tensor:
    """The gradient of the scores from that of the weights, which may be overwritten."""
    del seen  # where a weight is 0, so is the gradient
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


def settle(logits_N_V: Tensor, targets_N: Tensor, wanted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float32 log softmax at the targets; whether each target is the likeliest (of equals, the first);
    and, if `wanted`, onehot(target) - softmax in the logits' place."""
    right_N = logits_N_V.argmax(-1) == targets_N
    logp_N_V = torch.log_softmax(logits_N_V.float(), dim=-1)
    chosen_N = logp_N_V.gather(1, targets_N[:, None])[:, 0]
    if not wanted:
        return chosen_N, right_N, None
    residual_N_V = logp_N_V.exp_().neg_()
    residual_N_V[torch.arange(len(targets_N), device=targets_N.device), targets_N] += 1.0
    return chosen_N, right_N, residual_N_V.to(logits_N_V.dtype)


def total(x_M_K: Tensor, w_K_N: Tensor, more: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """x w, or x w + y v where `more` is (y, v), summed in float32: what comes second is added to the first
    inside its product.

    With y v the other way round, what a young adapter adds to a bf16 base's output would be below half a unit
    in its last place, and be rounded away.
    """
    return x_M_K @ w_K_N if more is None else (more[0] @ more[1]).addmm_(x_M_K, w_K_N)


def outer(x_T_M: Tensor, y_T_N: Tensor) -> Tensor:
    """x^T y as float32 (M, N): the sum over all tokens of the outer product of their rows."""
    return (x_T_M.T @ y_T_N).float()


def _tanh_gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")


def _tanh_gelu_slope(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")  # type: ignore[no-any-return]


ACTIVATIONS: dict[str, tuple[Kernel, Kernel]] = {
    "silu": (silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (_tanh_gelu, _tanh_gelu_slope),
}


PLAIN = Kernels(
    norm=norm, norm_backward=norm_backward,
    gate={name: _gate(forward) for name, (forward, _) in ACTIVATIONS.items()},
    gate_backward={name: _gate_backward(*pair) for name, pair in ACTIVATIONS.items()},
    soften=soften, soften_backward=soften_backward, turn=turn, unturn=unturn, settle=settle, total=total,
    outer=outer,
)  # fmt: skip
