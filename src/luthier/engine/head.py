"""Log-probabilities of chosen tokens, from hidden states: the one primitive every loss stands on.

Source: log softmax; d log p(t) / d h = W_t - sum_v p_v W_v, which does not depend on the loss above, so it is
formed in the forward pass while a tile of logits is at hand (as in Liger, Hsu et al. 2024, arXiv 2410.10989,
and cut cross-entropy, Wijmans et al. 2024, arXiv 2411.09009). Only tokens with a loss are computed, a tile
of rows at a time, so the logits of a batch never exist at once; softmax is float32.

It does not know losses, biased heads or models that scale or cap their logits: `base.prove` refuses those.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luthier.engine.attention import Documents
from luthier.objectives import Batch

TILE = 128  # rows of logits alive at once


def token_logps(hidden_N_E: Tensor, weight_V_E: Tensor, targets_N: Tensor, tile: int = TILE) -> Tensor:
    """logp_N in float32: log softmax(hidden @ weight.T) at the target of each row."""
    logp_N: Tensor = _TokenLogps.apply(hidden_N_E, weight_V_E, targets_N, tile)  # type: ignore[no-untyped-call]
    return logp_N


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_N_E: Tensor, weight_V_E: Tensor, targets_N: Tensor, tile: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        logp_N = torch.empty(len(targets_N), dtype=torch.float32, device=hidden_N_E.device)
        slope_N_E = torch.empty_like(hidden_N_E) if needs_hidden else None
        for start in range(0, len(targets_N), tile):
            part = slice(start, start + tile)
            logp_n_V = _log_softmax(hidden_N_E[part], weight_V_E)
            logp_N[part] = logp_n_V.gather(1, targets_N[part, None])[:, 0]
            if slope_N_E is not None:
                slope_N_E[part] = _residual(logp_n_V, targets_N[part]).to(weight_V_E.dtype) @ weight_V_E
        ctx.save_for_backward(slope_N_E, targets_N, *((hidden_N_E, weight_V_E) if needs_weight else ()))
        ctx.tile = tile
        return logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        slope_N_E, targets_N, *trained = ctx.saved_tensors
        hidden_grad = None if slope_N_E is None else (grad_N[:, None] * slope_N_E).to(slope_N_E.dtype)
        weight_grad = None
        if trained:
            hidden_N_E, weight_V_E = trained
            weight_grad = torch.zeros_like(weight_V_E, dtype=torch.float32)
            for start in range(0, len(targets_N), ctx.tile):
                part = slice(start, start + ctx.tile)
                residual = _residual(_log_softmax(hidden_N_E[part], weight_V_E), targets_N[part])
                weight_grad += (residual * grad_N[part, None]).T @ hidden_N_E[part].float()
            weight_grad = weight_grad.to(weight_V_E.dtype)
        return hidden_grad, weight_grad, None, None


def _log_softmax(hidden_n_E: Tensor, weight_V_E: Tensor) -> Tensor:
    return torch.log_softmax((hidden_n_E @ weight_V_E.T).float(), dim=-1)


def _residual(logp_n_V: Tensor, targets_n: Tensor) -> Tensor:
    """onehot(target) - p, reusing the tile's memory."""
    residual = logp_n_V.exp_().neg_()
    residual[torch.arange(len(targets_n), device=targets_n.device), targets_n] += 1.0
    return residual


def batch_logps(model: Any, batch: Batch, tile: int = TILE) -> Tensor:
    """logp_N of a packed batch under a decoder: hidden states, then `token_logps` where there is a loss."""
    output = model.get_decoder()(
        input_ids=batch.ids_T[None],
        position_ids=batch.positions_T[None],
        documents=Documents.of(batch.lengths_S or batch.lengths_D, batch.parents_S),
        use_cache=False,
    )
    hidden_N_E = output.last_hidden_state[0].index_select(0, batch.places_N)
    return token_logps(hidden_N_E, model.get_output_embeddings().weight, batch.targets_N, tile)
