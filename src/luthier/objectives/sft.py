"""Supervised fine-tuning: maximise the likelihood of the assistant's tokens, given everything before them.

Source: Ouyang et al. 2022, "Training language models to follow instructions with human feedback"
(arXiv 2203.02155), section 3.5; the negative log-likelihood of the answer tokens y of a prompt x,

    L = - (1 / N) * sum over the N answer tokens of log p(y_t | x, y_<t)

where N counts the answer tokens of a whole optimiser step, so a long row weighs more than a short one.
It does not know padding, packing or how many micro-batches make a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier import plugins
from luthier.objectives import Batch, Loss

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ROWS = "Chat"
NEEDS: frozenset[str] = frozenset()


class Params(plugins.Params):
    """Plain likelihood has no knobs."""


def loss(policy: Tensor, reference: Tensor | None, batch: Batch, params: Params) -> Loss:
    """Minus the log-likelihood of the batch's answer tokens (`policy` is logp_N), as a sum."""
    del reference, batch, params
    return Loss(total=-policy.sum(), count=policy.numel())
