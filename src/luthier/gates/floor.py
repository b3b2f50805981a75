"""Floor gate: a score of the tuned model must reach a minimum, at its point or at its interval's low end.

It reads the scorecard; it does not know how scores are made.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from luthier import plugins
from luthier.gates import Evidence, Verdict


class Params(plugins.Params):
    metric: Literal["accuracy", "f1", "precision", "recall", "kappa"] = "accuracy"
    minimum: float = Field(ge=-1, le=1)
    bound: Literal["point", "low"] = Field(default="point", description="`low`: the 95 % interval's low end")


def check(params: Params, evidence: Evidence) -> Verdict:
    tuned = evidence.scorecard["systems"]["tuned"]
    if params.bound == "low" and params.metric != "accuracy":
        return Verdict(False, f"there is no interval for {params.metric}; use bound: point")
    found = tuned["low"] if params.bound == "low" else tuned[params.metric]
    name = f"{params.metric}{' (low end of its interval)' if params.bound == 'low' else ''}"
    if found is None:
        return Verdict(False, f"{name} was not measured; set `evaluate.labels` and `evaluate.positive`")
    verb = "reaches" if found >= params.minimum else "is below"
    return Verdict(
        found >= params.minimum,
        f"{name} {found:.4f} {verb} the floor {params.minimum}",
        {"metric": params.metric, "found": found, "minimum": params.minimum, "bound": params.bound},
    )
