"""Parity gate: a stranger with plain transformers and peft gets the very tokens that we serve.

The saved folders are loaded by `AutoModelForCausalLM` and `peft.PeftModel` alone; each probe is answered
greedily by both, by us through the engine that will serve. A first difference is excused only in a 16-bit
model, and only where the choice is the rounding's and not the model's: the same model in float32 says what
is true there; the stranger's own 16-bit logits are off from that by up to some `e`; two numbers that are
each off by `e` can change places when they lie within 2 `e`, so the token we served must lie that near to
the best in float32. It does not know luthier's engine; the answers that will be served are handed to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from luthier import plugins
from luthier.gates import Evidence, Verdict

SIXTEEN_BITS = ("torch.bfloat16", "torch.float16")
NEAR_BEST = 20  # of the likeliest tokens the stranger's error is taken


class Params(plugins.Params):
    rows: int = Field(default=50, ge=1, le=500, description="how many test rows to ask; all, if fewer")


def check(params: Params, evidence: Evidence) -> Verdict:
    probes = list(evidence.probes)[: params.rows]
    if not probes:
        return Verdict(False, "there is no probe to compare on")
    model, precise = _stranger(evidence, "auto"), None
    excused: list[dict[str, Any]] = []
    differing: list[dict[str, Any]] = []
    for n, probe in enumerate(probes):
        served = evidence.serve(probe)
        plain, logits = _answer(model, probe, evidence)
        if served == plain:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(served, plain, strict=False)) if a != b),
            min(len(served), len(plain)),
        )
        case = {"probe": n, "at": at, "served": served, "stranger": plain}
        if at < len(served) and at < len(plain) and str(model.dtype) in SIXTEEN_BITS:
            precise = precise or _stranger(evidence, "float32")
            true_V = _logits(precise, [*probe, *plain[:at]])
            case |= _rounding(true_V, logits[at], served[at])
        (excused if case.get("within") else differing).append(case)
    found: dict[str, Any] = {"probes": len(probes), "excused": excused, "differing": differing}
    ties = f", {len(excused)} of them up to a choice within 16-bit rounding" if excused else ""
    if differing:
        return Verdict(
            False, f"{len(differing)} of {len(probes)} answers differ from plain transformers + peft", found
        )
    return Verdict(True, f"all {len(probes)} answers equal plain transformers + peft{ties}", found)


def _stranger(evidence: Evidence, dtype: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(evidence.base), dtype=dtype, local_files_only=True)
    return PeftModel.from_pretrained(base, str(evidence.adapter)).eval()


def _answer(model: Any, probe: Any, evidence: Evidence) -> tuple[list[int], list[Any]]:
    """The stranger's greedy tokens, and the logits that each was chosen from."""
    import torch

    ids = torch.tensor([list(probe)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=evidence.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(evidence.stop_ids),
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(probe) :].tolist(), [logits[0].float() for logits in out.logits]


def _logits(model: Any, ids: Sequence[int]) -> Any:
    """Float32 logits (V) of what follows."""
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.tensor([list(ids)])).logits[0, -1].float()


def _rounding(true_V: Any, rounded_V: Any, served: int) -> dict[str, Any]:
    """How far the served token lies below the best, and how far off the stranger's own logits are."""
    best = true_V.topk(min(NEAR_BEST, len(true_V))).indices.tolist()
    error = float((rounded_V - true_V)[[*best, served]].abs().max())
    below = float(true_V.max() - true_V[served])
    return {"below_best": below, "strangers_error": error, "within": below <= 2 * error}
