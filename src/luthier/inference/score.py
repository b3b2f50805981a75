"""How likely the right answers are: mean negative log-likelihood per answer token, and its perplexity.

Source: perplexity = exp(mean token NLL) over answer tokens only; masked tokens do not count. Tokens that all
rows begin with are read once; rows are padded on the right, which under a causal mask changes nothing to
their left. It does not know labels or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luthier.engine.head import token_logps
from luthier.errors import DataError
from luthier.inference.generate import Runtime, batches, common_prefix

Row = tuple[Sequence[int], Sequence[bool]]


@dataclass(frozen=True)
class Likelihood:
    loss: float
    perplexity: float | None
    tokens: int


@torch.inference_mode()
def likelihood(
    runtime: Runtime, rows: Sequence[Row], adapter: str | None, tell: Callable[[int, int], None]
) -> Likelihood:
    """Rows are (token ids, mask of answer tokens), as `template.Encoded` has them."""
    total = -sum(row_logps(runtime, rows, adapter, tell))
    tokens = sum(sum(mask) for _, mask in rows)
    loss = total / tokens
    return Likelihood(loss, math.exp(loss) if loss < 700 else None, tokens)


@torch.inference_mode()
def row_logps(
    runtime: Runtime, rows: Sequence[Row], adapter: str | None, tell: Callable[[int, int], None]
) -> list[float]:
    """Of each row, the sum of its answer tokens' log-probabilities."""
    ids = [ids for ids, _ in rows]
    learnt = [[t for t, learnt in enumerate(mask) if learnt] for _, mask in rows]
    if not any(learnt):
        raise DataError("no row has an answer token to score")
    # The token before an answer gives that answer's probability, so it must not vanish into the prefix.
    length = min(common_prefix(ids), min(places[0] for places in learnt if places) - 1)
    shared = runtime.read_shared(ids, length, adapter)
    start = shared.get_seq_length()
    sums_R, done = torch.zeros(len(rows), dtype=torch.float64), 0
    for batch in batches([len(row) - start for row in ids]):
        hidden_B_T_E, head = _hidden(runtime, [ids[n][start:] for n in batch], shared, adapter)
        at = [(b, t - 1 - start) for b, n in enumerate(batch) for t in learnt[n]]
        rows_N, places_N = torch.tensor(at).reshape(-1, 2).T
        targets_N = torch.tensor([ids[n][t] for n in batch for t in learnt[n]])
        logp_N = token_logps(hidden_B_T_E[rows_N, places_N], head, targets_N).double()
        sums_R.index_add_(0, torch.tensor(batch)[rows_N], logp_N)
        done += len(batch)
        tell(done, len(rows))
    return [float(total) for total in sums_R]


def _hidden(
    runtime: Runtime, rows: Sequence[Sequence[int]], shared: Any, adapter: str | None
) -> tuple[Tensor, Tensor]:
    """Hidden states of rows behind the shared prefix, and the matrix that makes logits of them."""
    model = runtime.under(adapter)
    widest = max(map(len, rows))
    ids_B_T = torch.tensor([[*row, *[0] * (widest - len(row))] for row in rows])
    out = model.get_decoder()(
        input_ids=ids_B_T, past_key_values=runtime.fan_out(shared, len(rows)), use_cache=True
    )
    return out.last_hidden_state, model.get_output_embeddings().weight
