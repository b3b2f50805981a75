"""Log-probabilities of chosen tokens, from hidden states: the one primitive every loss stands on.

Source: log softmax; d log p(t) / d h = W_t - sum_v p_v W_v, which does not depend on the loss above, so it is
formed in the forward pass while a tile of logits is at hand (as in Liger, Hsu et al. 2024, arXiv 2410.10989,
and cut cross-entropy, Wijmans et al. 2024, arXiv 2411.09009). Only tokens with a loss are computed, a tile
of rows at a time, so the logits of a batch never exist at once; softmax is float32.

It does not know losses, biased heads or models that scale or cap their logits: `prove` refuses those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.engine.attention import IMPLEMENTATION, Documents
from luthier.engine.batch import collate
from luthier.errors import ModelError
from luthier.objectives import Batch
from luthier.template import Encoded

TILE = 128  # rows of logits alive at once


def token_logps(hidden_N_E: Tensor, weight_V_E: Tensor, targets_N: Tensor, tile: int = TILE) -> Tensor:
    """logp_N in float32: log softmax(hidden @ weight.T) at the target of each row."""
    logp_N: Tensor = _TokenLogps.apply(hidden_N_E, weight_V_E, targets_N, tile)
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
    """logp_N of a packed batch under a decoder model: its hidden states, then `token_logps` at the places with a loss."""
    output = model.get_decoder()(
        input_ids=batch.ids_T[None],
        position_ids=batch.positions_T[None],
        documents=Documents.of(batch.lengths_D),
        use_cache=False,
    )
    hidden_N_E = output.last_hidden_state[0].index_select(0, batch.places_N)
    return token_logps(hidden_N_E, model.get_output_embeddings().weight, batch.targets_N, tile)


@torch.no_grad()
def prove(model: Any, rows: Sequence[Encoded], tile: int = TILE) -> float:
    """Compare packed log-probabilities with transformers' own, row by row; raise `ModelError` where they part.

    Models with a biased head, scaled or capped logits, or attention that only a mask could express differ
    by far more than rounding does, so no list of architectures is needed. Returns the largest difference.
    """
    training = model.training
    model.eval()
    packed = batch_logps(model, collate(rows), tile)
    try:
        model.set_attn_implementation("sdpa")
        alone = torch.cat([_plain_logps(model, collate([row])) for row in rows])
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
        model.train(training)
    worst = float((packed - alone).abs().max()) if len(packed) else 0.0
    mean = float((packed - alone).abs().mean()) if len(packed) else 0.0
    # bf16 logits are rounded to 3 digits, so single tokens differ; a wrong formula moves every token.
    limit = 1e-3 if packed.dtype == alone.dtype and _dtype(model) == torch.float32 else 0.15
    if not mean <= limit:
        raise ModelError(
            f"packed training does not give this model's own log-probabilities: mean difference {mean:.3g}, "
            f"worst {worst:.3g} over {len(packed)} tokens",
            hint="this architecture does something the engine does not know; choose another base model",
        )
    return worst


def _plain_logps(model: Any, batch: Batch) -> Tensor:
    logits_T_V = model(input_ids=batch.ids_T[None], use_cache=False).logits[0]
    logp_N_V = torch.log_softmax(logits_T_V.index_select(0, batch.places_N).float(), dim=-1)
    return logp_N_V.gather(1, batch.targets_N[:, None])[:, 0]


def _dtype(model: Any) -> torch.dtype:
    dtype: torch.dtype = model.get_output_embeddings().weight.dtype
    return dtype
