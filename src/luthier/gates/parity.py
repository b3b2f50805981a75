"""Parity gate: a stranger with plain transformers and peft gets the very tokens that we serve.

The saved folders are loaded by `AutoModelForCausalLM` and `peft.PeftModel` alone; each probe is answered
greedily by both. A first difference is excused only in a 16-bit model and only where the stranger's own two
best logits are equal or one rounding step apart: there the choice is the rounding's, not the model's. It
does not know luthier's engine; the answers that will be served are handed to it.
"""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from luthier import plugins
from luthier.gates import Evidence, Verdict

MANTISSA_BITS = {"torch.bfloat16": 7, "torch.float16": 10}


class Params(plugins.Params):
    rows: int = Field(default=50, ge=1, le=500, description="how many test rows to ask; all, if fewer")


def check(params: Params, evidence: Evidence) -> Verdict:
    probes = list(evidence.probes)[: params.rows]
    if not probes:
        return Verdict(False, "there is no probe to compare on")
    model = _stranger(evidence)
    excused: list[dict[str, Any]] = []
    differing: list[dict[str, Any]] = []
    for n, probe in enumerate(probes):
        served = evidence.serve(probe)
        plain, gaps = _answer(model, probe, evidence)
        if served == plain:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(served, plain, strict=False)) if a != b),
            min(len(served), len(plain)),
        )
        case = {"probe": n, "at": at, "served": served, "stranger": plain}
        (excused if at < len(gaps) and gaps[at] else differing).append(case)
    found: dict[str, Any] = {"probes": len(probes), "excused_ties": excused, "differing": differing}
    ties = f", {len(excused)} of them ties within one rounding step" if excused else ""
    if differing:
        return Verdict(
            False, f"{len(differing)} of {len(probes)} answers differ from plain transformers + peft", found
        )
    return Verdict(True, f"all {len(probes)} answers equal plain transformers + peft{ties}", found)


def _stranger(evidence: Evidence) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(evidence.base), dtype="auto", local_files_only=True)
    return PeftModel.from_pretrained(base, str(evidence.adapter)).eval()


def _answer(model: Any, probe: Any, evidence: Evidence) -> tuple[list[int], list[bool]]:
    """The stranger's greedy tokens, and for each whether its two best logits were a tie."""
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
    tokens = out.sequences[0, len(probe) :].tolist()
    bits = MANTISSA_BITS.get(str(model.dtype))
    return tokens, [_tie(logits[0].float().topk(2).values.tolist(), bits) for logits in out.logits]


def _tie(best: list[float], bits: int | None) -> bool:
    """Whether two logits lie within one step of a 16-bit float of `bits` mantissa bits."""
    if bits is None or best[0] == 0:
        return False
    step = 2.0 ** (math.floor(math.log2(abs(best[0]))) - bits)
    return best[0] - best[1] <= step
