"""How likely the right answers are: mean negative log-likelihood per answer token, and its perplexity.

Source: perplexity = exp(mean token NLL) over answer tokens only; masked tokens do not count. Rows are padded
on the right, which under a causal mask changes nothing to their left. It does not know labels or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from luthier.engine.generate import Runtime, batches
from luthier.engine.head import token_logps


@dataclass(frozen=True)
class Likelihood:
    loss: float
    perplexity: float | None
    tokens: int


@torch.inference_mode()
def likelihood(
    runtime: Runtime,
    rows: Sequence[tuple[Sequence[int], Sequence[bool]]],
    adapter: str | None,
    tell: Callable[[int, int], None],
) -> Likelihood:
    """Rows are (token ids, mask of answer tokens), as `template.Encoded` has them."""
    model = runtime.under(adapter)
    total, tokens, done = 0.0, 0, 0
    for batch in batches([len(ids) for ids, _ in rows]):
        widest = max(len(rows[n][0]) for n in batch)
        ids_BT = torch.tensor([list(rows[n][0]) + [0] * (widest - len(rows[n][0])) for n in batch])
        places = [(b, t) for b, n in enumerate(batch) for t, learnt in enumerate(rows[n][1]) if learnt]
        at = torch.tensor([(b, t - 1) for b, t in places])
        hidden = model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden_N_E = hidden[at[:, 0], at[:, 1]]
        targets_N = torch.tensor([rows[batch[b]][0][t] for b, t in places])
        total -= float(
            token_logps(hidden_N_E, model.get_output_embeddings().weight, targets_N).double().sum()
        )
        tokens += len(places)
        done += len(batch)
        tell(done, len(rows))
    loss = total / tokens
    return Likelihood(loss, math.exp(loss) if loss < 700 else None, tokens)
