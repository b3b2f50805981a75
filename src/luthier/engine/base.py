"""A base model made ready for packed training, and the proof that packing leaves it the model it was.

`prove` compares the engine's log-probabilities with transformers' own, row by row. A model with a biased
head, scaled or capped logits, or attention that only a mask could express differs by far more than rounding
does, so no list of architectures is needed. It does not know adapters or tokenizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from luthier.engine.attention import IMPLEMENTATION
from luthier.engine.batch import collate
from luthier.engine.head import TILE, batch_logps
from luthier.errors import ModelError
from luthier.objectives import Batch
from luthier.template import Encoded

# bf16 logits carry 3 digits, so single tokens differ a little; a wrong formula moves every token.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def load(folder: Path, dtype: str) -> Any:
    """The model of a folder, from disk alone, with the engine's attention and in `dtype`."""
    return _made(
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=IMPLEMENTATION,
            local_files_only=True,
            use_safetensors=True,
        ),
    )


def outline(folder: Path) -> Any:
    """The same model without its weights: shapes alone, for closed forms."""

    def make() -> Any:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))

    return _made(folder, make)


def stored(folder: Path) -> set[str]:
    """The number types of the weights as they lie on disk, by torch's names."""
    names = {"BF16": "bfloat16", "F32": "float32", "F16": "float16"}
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return {names.get(kind, kind) for kind in found}


def _made(folder: Path, make: Any) -> Any:
    transformers_logging.disable_progress_bar()  # progress is shown by whoever asked, not by the library
    if not any(folder.glob("*.safetensors")):
        raise ModelError("no safetensors weights here", where=str(folder), hint="only safetensors are loaded")
    try:
        return make()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"transformers cannot load this base model: {first}", where=str(folder)) from error


@torch.no_grad()
def prove(model: Any, rows: Sequence[Encoded], tile: int = TILE) -> float:
    """Raise `ModelError` unless packed rows have this model's own log-probabilities; return the worst gap."""
    training = model.training
    model.eval()
    packed_N = batch_logps(model, collate(rows), tile)
    try:
        model.set_attn_implementation("eager")
        alone_N = torch.cat([_plain_logps(model, collate([row])) for row in rows])
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
        model.train(training)
    if not len(packed_N):
        raise ModelError("these rows have no token to learn, so nothing can be compared")
    gaps_N = (packed_N - alone_N).abs()
    limit = TOLERANCE.get(model.get_output_embeddings().weight.dtype, max(TOLERANCE.values()))
    if not float(gaps_N.mean()) <= limit:
        raise ModelError(
            f"packed training does not give this model's own log-probabilities: mean difference "
            f"{float(gaps_N.mean()):.3g}, worst {float(gaps_N.max()):.3g} over {len(gaps_N)} tokens",
            hint="this architecture does something the engine does not know; choose another base model",
        )
    return float(gaps_N.max())


def _plain_logps(model: Any, batch: Batch) -> Tensor:
    logits_T_V = model(input_ids=batch.ids_T[None], use_cache=False).logits[0]
    logp_N_V = torch.log_softmax(logits_T_V.index_select(0, batch.places_N).float(), dim=-1)
    return logp_N_V.gather(1, batch.targets_N[:, None])[:, 0]
