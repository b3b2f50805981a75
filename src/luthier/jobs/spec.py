"""A job as a recipe: what "auto" becomes, what a base's section says, and which gates every job must pass.

"auto", as OpenAI's cookbook (chat_finetuning_data_prep) settles epochs, and by rules of our own for the rest:
- `n_epochs`: 3; if fewer than 100 examples would be seen in all: 100 // rows, at most 25; if more than
  25,000: 25,000 // rows, at least 1. Reinforcement: 1.
- `batch_size`: a sixteenth of the rows, between 1 and 16.
- `learning_rate_multiplier`: 1, on the learning rate below of the job's kind. `beta`: 0.1.
- `compute_multiplier`: 1, on 8 answers for each prompt; `eval_interval`: a twentieth of the steps;
  `eval_samples`: 1.

All rows of the training file are learnt and none is held out, as OpenAI does; a validation file is looked at
while training, the best weights by its loss are kept, and the examination asks its rows. Without one the
examination asks training rows and says so. It does not know files' contents, queues or workers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier import artifacts, metrics, plugins
from luthier.bases import Entry
from luthier.errors import GraderError
from luthier.jobs.asked import SEEDS, Create, Hyperparameters, Refused
from luthier.jobs.records import Job
from luthier.plugins import Part
from luthier.recipe import Recipe
from luthier.sources import _licence

RATES = {"supervised": 2e-4, "dpo": 2e-5, "reinforcement": 2e-5}
OBJECTIVES = {"supervised": "sft", "dpo": "dpo", "reinforcement": "grpo"}
EXAMPLES = (100, 25_000)  # that OpenAI's "auto" wants to be seen in all
EPOCHS = 3
MOST_EPOCHS = 25
ANSWER = 128  # tokens of an answer that a grader scores, at most
GROUP = 8  # answers sampled for each prompt of a reinforcement job
LOOKS = 20  # at held-out rows, in all of a training
NEVER = 1_000_000  # a patience that no training outlasts: what was paid for is trained
MAX_LENGTH = 4096
EXAMINED = 32  # rows
KEPT = 3  # checkpoints of a job, as OpenAI has it
LOSS_TOLERANCE = 0.02
LIMITS = (
    "Trained by a fine-tuning job on rows that its owner uploaded. Nobody at this server has read them or "
    "judged the answers."
)


@dataclass(frozen=True)
class Terms:
    """What the machine's owner sets for every job: memory for one, processor threads, and a price."""

    memory_gb: float | None
    threads: int | None = None
    price_per_hour: float | None = None


def available(asked: Create) -> None:
    """Refuse by its name what this luthier cannot train."""
    kind = asked.how.type
    if OBJECTIVES[kind] not in plugins.names("objectives"):  # luthier was taken apart, or is of an older day
        raise Refused(f"method {kind!r} is not available here", param="method", code="unsupported_method")
    if asked.how.reinforcement is not None:
        _grader(asked.how.reinforcement.grader, asked.model)
    licence = (asked.metadata or {}).get("licence")
    if licence is not None and _licence.spdx(licence) is None:
        raise Refused(_licence.unknown(licence), param="metadata.licence", code="invalid_value")


def drawn(asked: Create, training_sha256: str, validation_sha256: str | None) -> int:
    """The seed of a job that gives none: of what it asks for, so that a quote and its job are of one seed."""
    if asked.seed is not None:
        return asked.seed
    what = asked.model_dump(mode="json", include={"model", "method", "hyperparameters"})
    said = artifacts.canonical([what, training_sha256, validation_sha256])
    return int.from_bytes(hashlib.sha256(said).digest()[:8], "big") % SEEDS


def settled(asked: Create, rows: int, held_out: int) -> dict[str, Any]:
    """Every "auto" as a number, and the rows that it came from."""
    method = asked.how
    given = method.settings
    few, many = EXAMPLES
    epochs = EPOCHS if method.type != "reinforcement" else 1
    if rows * epochs < few and method.type != "reinforcement":
        epochs = min(MOST_EPOCHS, max(1, few // rows))
    elif rows * epochs > many:
        epochs = max(1, many // rows)
    auto: dict[str, Any] = {
        "n_epochs": epochs, "batch_size": max(1, min(16, rows // 16)), "learning_rate_multiplier": 1.0,
    }  # fmt: skip
    found = _numbers(given, auto)
    steps = math.ceil(rows * found["n_epochs"] / found["batch_size"])
    more: dict[str, Any] = {
        "beta": 0.1, "compute_multiplier": 1.0, "eval_samples": 1, "reasoning_effort": "default",
        "eval_interval": max(1, math.ceil(steps / LOOKS)),
    }  # fmt: skip
    return found | _numbers(given, more) | {"rows": rows, "validation_rows": held_out, "steps": steps}


def longest(base: Entry) -> int:
    """The most tokens that a row of this base's may have."""
    return min(MAX_LENGTH, int(base.facts.get("context") or MAX_LENGTH))


def _numbers(given: Hyperparameters, auto: dict[str, Any]) -> dict[str, Any]:
    asked = {name: getattr(given, name) for name in auto if hasattr(given, name)}
    return {name: auto[name] if value in ("auto", None) else value for name, value in asked.items()}


def recipe(job: Job, terms: Terms, files: dict[str, str]) -> Recipe:
    """The job as a frozen recipe; `files` are the paths of its rows by split."""
    asked = Create.model_validate(job.asked)
    kind, values = asked.how.type, job.settled or {}
    licence = (asked.metadata or {}).get("licence", _licence.OWN)
    purpose = (
        f"fine-tuning of {job.base} for {job.tenant}; the right to use them is as their uploader states it"
    )
    examined = "validation" if "validation" in files else "train"
    every = max(1, math.ceil(values["steps"] / LOOKS))
    return Recipe.model_validate(
        {
            "luthier": 1,
            "name": job.id,
            "seed": job.seed,
            "data": {
                "sources": [
                    {"from": {"name": "files", "files": files}, "licence": licence, "purpose": purpose}
                ],
                "split": {"validation": 0, "test": 0},
                "dedup": "none",
            },
            "model": dict(job.section),
            "plan": {
                "max_length": values["max_length"],
                "memory_gb": terms.memory_gb,
                "threads": terms.threads,
                "price_per_hour": terms.price_per_hour,
            },
            "train": [
                {
                    "objective": objective(asked, values),
                    "epochs": values["n_epochs"],
                    "batch": values["batch_size"],
                    "lr": min(1.0, RATES[kind] * values["learning_rate_multiplier"]),
                    "validation": {"every": values.get("eval_interval", every), "patience": NEVER},
                    "keep": {"at": "epochs", "last": KEPT},
                }
            ],
            "evaluate": {
                "split": examined, "rows": EXAMINED, "latency_requests": 5,
                "max_new_tokens": ANSWER if kind == "reinforcement" else 32,
            },
            "release": {
                "gates": gates(kind),
                "intended_use": f"what its owner ({job.tenant}) fine-tuned {job.base} for",
                "limits": LIMITS,
            },
        }
    )  # fmt: skip


def objective(asked: Create, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is minimised, in the words of its part."""
    kind = asked.how.type
    if kind == "dpo":
        return {"name": "dpo", "beta": values["beta"]}
    if kind == "reinforcement" and asked.how.reinforcement is not None:
        group = max(2, min(256, round(GROUP * values["compute_multiplier"])))
        grader = _grader(asked.how.reinforcement.grader, asked.model).as_dict()
        return {"name": "grpo", "grader": grader, "group": group, "max_new_tokens": ANSWER}
    return {"name": "sft"}


def _grader(grader: object, base: str) -> Part:
    """The grader as a part, or `Refused` naming the field."""
    where = "method.reinforcement.grader"
    try:
        return metrics.read(_judged(grader, base, where), where)
    except GraderError as error:
        raise Refused(error.what, param=error.where, code="invalid_grader") from None


def _judged(grader: object, base: str, where: str) -> object:
    """The same with the base as the judge's name: while training, it is the only model at hand."""
    if not isinstance(grader, Mapping):
        return grader
    found, members = dict(grader), grader.get("graders")
    if found.get("type") == "score_model" and found.get("model") not in (None, "base"):
        if found["model"] != base:
            raise GraderError(
                f"the judge of a job is the base that it tunes: name {base!r}", where=f"{where}.model"
            )
        found["model"] = "base"
    if found.get("type") == "multi" and isinstance(members, Mapping):
        single = isinstance(members.get("type"), str)
        found["graders"] = (
            _judged(members, base, f"{where}.graders")
            if single
            else {name: _judged(each, base, f"{where}.graders.{name}") for name, each in members.items()}
        )
    return found


def gates(kind: str) -> list[dict[str, Any]]:
    """Every job's model must answer as served elsewhere; one that learnt answers must find them likelier."""
    parity = {"name": "parity", "rows": 8}
    return [{"name": "loss", "tolerance": LOSS_TOLERANCE}, parity] if kind == "supervised" else [parity]
