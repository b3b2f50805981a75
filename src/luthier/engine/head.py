"""Log-probabilities of chosen tokens, from hidden states: the one primitive every loss stands on.

Source: log softmax; d log p(t) / d h = W_t - sum_v p_v W_v, which does not depend on the loss above, so it is
formed in the forward pass while a tile of logits is at hand (as in Liger, Hsu et al. 2024, arXiv 2410.10989,
and cut cross-entropy, Wijmans et al. 2024, arXiv 2411.09009). Only tokens with a loss are computed, a tile
of rows at a time, so the logits of a batch never exist at once; softmax is float32.

It does not know losses, biased heads or models that scale or cap their logits: `base.prove` refuses those.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from luthier.engine.documents import Documents
from luthier.engine.kernels import PLAIN, Kernel, Kernels
from luthier.objectives import Batch

TILE = 256  # rows of logits alive at once


class Scored(NamedTuple):
    """Of each target: its log-probability in float32, and whether no other token was likelier."""

    logp_N: Tensor
    right_N: Tensor


def token_scores(
    hidden_N_E: Tensor, weight_V_E: Tensor, targets_N: Tensor, tile: int = TILE, settle: Kernel = PLAIN.settle
) -> Scored:
    """log softmax(hidden @ weight.T) at the target of each row, and whether it is the largest."""
    at = (hidden_N_E, weight_V_E, targets_N, tile, settle)
    return Scored(*_TokenScores.apply(*at))  # type: ignore[no-untyped-call]


def token_logps(
    hidden_N_E: Tensor, weight_V_E: Tensor, targets_N: Tensor, tile: int = TILE, settle: Kernel = PLAIN.settle
) -> Tensor:
    """The log-probabilities of `token_scores` alone."""
    return token_scores(hidden_N_E, weight_V_E, targets_N, tile, settle).logp_N


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_N_E: Tensor, weight_V_E: Tensor, targets_N: Tensor, tile: int, settle: Kernel
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        logp_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_N_E.device)
        right_N = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_N_E.device)
        slope_N_E = torch.empty_like(hidden_N_E) if needs_hidden else None
        for start in range(0, len(targets_N), tile):
            part = slice(start, start + tile)
            logits_n_V = hidden_N_E[part] @ weight_V_E.T
            logp_N[part], right_N[part], residual_n_V = settle(logits_n_V, targets_N[part], needs_hidden)
            if slope_N_E is not None:
                torch.mm(residual_n_V, weight_V_E, out=slope_N_E[part])
            del logits_n_V, residual_n_V  # before the next tile is made
        ctx.save_for_backward(slope_N_E, targets_N, *((hidden_N_E, weight_V_E) if needs_weight else ()))
        ctx.tile, ctx.settle = tile, settle
        ctx.mark_non_differentiable(right_N)
        return logp_N, right_N

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_N: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        slope_N_E, targets_N, *trained = ctx.saved_tensors
        hidden_grad = None if slope_N_E is None else (grad_N[:, None] * slope_N_E).to(slope_N_E.dtype)
        weight_grad = None
        if trained:
            hidden_N_E, weight_V_E = trained
            weight_grad = torch.zeros_like(weight_V_E, dtype=torch.float32)
            for start in range(0, len(targets_N), ctx.tile):
                part = slice(start, start + ctx.tile)
                _, _, residual = ctx.settle(hidden_N_E[part] @ weight_V_E.T, targets_N[part], True)
                weight_grad += (residual.float() * grad_N[part, None]).T @ hidden_N_E[part].float()
            weight_grad = weight_grad.to(weight_V_E.dtype)
        return hidden_grad, weight_grad, None, None, None


def batch_scores(model: Any, batch: Batch, tile: int = TILE, formulas: Kernels = PLAIN) -> Scored:
    """A packed batch under a decoder: hidden states, then `token_scores` where there is a loss."""
    output = model.get_decoder()(
        input_ids=batch.ids_T[None],
        position_ids=batch.positions_T[None],
        documents=Documents.of(batch.lengths_S or batch.lengths_D, batch.parents_S),
        use_cache=False,
    )
    hidden_N_E = output.last_hidden_state[0].index_select(0, batch.places_N)
    if batch.temperature != 1.0:
        hidden_N_E = hidden_N_E / batch.temperature  # and so are the logits made of it
    head_V_E = model.get_output_embeddings().weight
    return token_scores(hidden_N_E, head_V_E, batch.targets_N, tile, formulas.settle)


def batch_logps(model: Any, batch: Batch, tile: int = TILE, formulas: Kernels = PLAIN) -> Tensor:
    """The log-probabilities of `batch_scores` alone."""
    return batch_scores(model, batch, tile, formulas).logp_N
