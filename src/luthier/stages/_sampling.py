"""What sampling answers takes beside learning from them: known, measured or said to be unknown, by the plan.

Memory: the base a second time (the engine that serves holds its own), the keys and values of as many answers
as grow together at their longest, and their logits. Time: a few tokens of the first step's answers on the
bare base, stretched to the longest an answer may be; adapters and answers that end early move it either way.
For a device of the table there is nothing to measure, so its time is unknown and the plan says so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from luthier import artifacts, metrics
from luthier.engine import batch
from luthier.errors import PlanError
from luthier.forecast.footprint import Shape
from luthier.inference import rollout
from luthier.inference.generate import Runtime
from luthier.inference.rollout import Asked, Drawing
from luthier.plugins import Part
from luthier.rows import Prompt, again
from luthier.stages import Inputs
from luthier.stages._elsewhere import Work

SPLITS = ("train", "validation", "test")
TRIAL_TOKENS = 8
LOGIT_BYTES = 4 + 3 * 8  # of a token's chance to be next: float32, then its share, their sums and a copy


def wanted(phase: Any) -> bool:
    return "rollouts" in phase.objective.module.NEEDS


def refuse(section: Any, inputs: Inputs) -> None:
    """What would fail later: a grader that does not suit a row, a judge that is not there."""
    params = section.phases[0].objective.params
    if section.budget.processes > 1:
        raise PlanError(
            "answers are sampled by one process; several cannot share that yet",
            where="plan.processes", hint="plan.processes: 1",
        )  # fmt: skip
    for model in judges(params.grader):
        if model != "base":
            raise PlanError(
                f"the grader asks {model!r}, and the only judge at hand while training is the base itself",
                where="train.0.objective.grader.model", hint="model: base, or a grader that asks no model",
            )  # fmt: skip
    for split in SPLITS:
        for record in artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / f"{split}.jsonl"):
            row = again(record)
            if isinstance(row, Prompt):
                metrics.check(params.grader, row.item, row.where)


def judges(grader: Part) -> list[str]:
    """The models that a grader, or any of its members, asks."""
    params: Any = grader.params
    if grader.name == "multi":
        return [model for member in params.graders.values() for model in judges(member)]
    return [params.model] if grader.name == "score_model" else []


def held_bytes(shape: Shape, phase: Any, longest: int) -> int:
    """What sampling holds at its largest; `longest` is a prompt with an answer as long as it may be."""
    params = phase.objective.params
    rows: int = min(phase.batch * params.group, max(rollout.ROWS, params.group))
    keys_values: int = 2 * shape.layers * shape.keys * shape.weight_bytes * rows * longest
    return shape.parameters * shape.weight_bytes + keys_values + rows * shape.vocabulary * LOGIT_BYTES


def minutes(phase: Any, inputs: Inputs, work: Work) -> float:
    """All samplings and looks at held-out reward, if every answer becomes as long as it may."""
    params, loader = phase.objective.params, work.loader
    rows = [loader.rows[row] for row in batch.rows_of(loader.ids, loader.batch, loader.seed, 1)]
    asked = [Asked(row[0].id, row[0].ids[: row[0].mask.index(True)], len(row)) for row in rows]
    model = Runtime.load(inputs.artefacts["model"] / "base").under(None)
    _seconds(model, asked, 1)  # warms caches up
    first_s = _seconds(model, asked, 1)
    token_s = max(0.0, _seconds(model, asked, 1 + TRIAL_TOKENS) - first_s) / TRIAL_TOKENS
    sampling_s = first_s + (params.max_new_tokens - 1) * token_s
    samplings = math.ceil(work.steps / params.iterations)
    held_out = decisions(phase, inputs)["validation_rows"]
    looked = (1 + math.ceil(work.steps / phase.validation.every)) if held_out else 0
    found: float = (samplings + looked * held_out / (phase.batch * params.group)) * sampling_s / 60
    return found


def decisions(phase: Any, inputs: Inputs) -> dict[str, int]:
    """How many prompts held-out reward is looked at on; no row of them has a loss."""
    held_out = artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / "validation.jsonl")
    return {"validation_rows": min(len(held_out), phase.validation.rows)}


def _seconds(model: Any, asked: Sequence[Asked], tokens: int) -> float:
    how = Drawing(0, 0, tokens, 1.0, frozenset())
    began = time.perf_counter()
    rollout.sample(model, asked, how, lambda done, whole: None)
    return time.perf_counter() - began
