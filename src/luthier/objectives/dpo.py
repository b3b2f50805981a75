"""Direct preference optimisation: the chosen answer gains on the rejected one, against a reference model.

Source: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290), equation 7; for a prompt x
with a chosen answer w and a rejected one l, the sum over their tokens being log p(y | x),

    L = - log sigmoid(beta * m),    m = (log p(w|x) - log q(w|x)) - (log p(l|x) - log q(l|x))

where q is the reference, the model before training. With `label_smoothing` e the preference is taken to be
wrong with probability e (conservative DPO: Mitchell 2023, "A note on DPO with noisy preferences &
relationship to IPO", https://ericmitchell.ai/cdpo.pdf, equation 3):

    L = - (1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)

At the first step p is q, so the loss is log 2. Units are pairs.

Documents come in pairs, the chosen one first. It does not know where q's log-probabilities come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from luthier import plugins
from luthier.objectives import Batch, Loss

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ROWS = "Pair"
NEEDS: frozenset[str] = frozenset({"reference"})
METRICS = ("preferred", "margin", "chosen_logp", "rejected_logp")


class Params(plugins.Params):
    beta: float = Field(default=0.1, gt=0, le=100, description="how dearly leaving the reference is paid for")
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of preferences taken to be the wrong way round"
    )


def loss(policy: Tensor, reference: Tensor | None, batch: Batch, params: Params) -> Loss:
    """The sum over the batch's pairs. `preferred`: pairs whose margin is above 0; `margin`: beta m."""
    from torch.nn.functional import logsigmoid

    assert reference is not None  # what needs a reference is given one
    said_D = policy.new_zeros(len(batch.lengths_D)).index_add(0, batch.rows_N, policy)
    gain_D = said_D.new_zeros(len(batch.lengths_D)).index_add(0, batch.rows_N, policy - reference)
    margin_P = params.beta * (gain_D[::2] - gain_D[1::2])
    smooth = params.label_smoothing
    total = -((1 - smooth) * logsigmoid(margin_P) + smooth * logsigmoid(-margin_P)).sum()
    metrics = {
        "preferred": float((margin_P > 0).sum()),
        "margin": float(margin_P.detach().sum()),
        "chosen_logp": float(said_D[::2].detach().sum()),
        "rejected_logp": float(said_D[1::2].detach().sum()),
    }
    return Loss(total, len(margin_P), metrics)
