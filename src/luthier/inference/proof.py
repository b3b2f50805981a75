"""Whether a model that was rebuilt to answer many at once still says what it said; read before it serves.

A prompt, read in chunks and token by token, must give the hidden states of transformers' untouched forward.
An architecture that does something the engine does not know fails that. It does not know how a model was
rebuilt.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.errors import ModelError
from luthier.inference.decode import Laid, Reach, Segment
from luthier.inference.pages import BLOCK

PROOF = (9, 8, 1, 1, 1)  # tokens read at a time; the first two as chunks
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.06}  # of the largest hidden state, in the mean


class Answers(Protocol):
    """What proves itself: the hidden states of a step's tokens."""

    blocks: int

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, ids_T: Tensor, laid: Laid) -> Tensor: ...


def proof(model: Any) -> Tensor:
    """The ids of the prompt that is read for proof."""
    return torch.arange(sum(PROOF)) * 7 % int(model.config.get_text_config().vocab_size)


@torch.inference_mode()
def prove(answers: Answers, ids_T: Tensor, plain_T_E: Tensor) -> None:
    """Read the ids as a server would and compare with transformers' own hidden states."""
    if answers.blocks * BLOCK < len(ids_T):
        raise ModelError(f"a cache of {answers.blocks} blocks of {BLOCK} tokens is too small to answer with")
    table = torch.arange(-(-len(ids_T) // BLOCK), dtype=torch.int32)[None]
    found, read = [], 0
    for count in PROOF:
        places, zeros = torch.arange(read, read + count), torch.zeros(count, dtype=torch.int64)
        reach = Reach(table, zeros, places + 1)
        laid = Laid(places, places, zeros, (Segment(0, 0, count),), reach)
        found.append(answers.hidden(ids_T[read : read + count], laid))
        read += count
    gap_T = (torch.cat(found).float() - plain_T_E.float()).abs().mean(-1)
    limit = TOLERANCE.get(answers.dtype, 0.06) * float(plain_T_E.float().abs().max())
    if not float(gap_T.max()) <= limit:
        raise ModelError(
            f"this model does not answer as transformers' own does: "
            f"hidden states differ by {float(gap_T.max()):.3g}",
            hint="its architecture does something the engine does not know; choose another base model",
        )


@torch.inference_mode()
def plainly(model: Any, ids_T: Tensor) -> Tensor:
    out = model.get_decoder()(input_ids=ids_T[None].to(model.device), use_cache=False)
    found: Tensor = out.last_hidden_state[0]
    return found
