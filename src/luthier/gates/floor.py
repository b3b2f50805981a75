"""Floor gate: a score of the tuned model must reach a minimum, at its point or at its interval's low end.

It reads the scorecard; it does not know how scores are made.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from luthier import plugins
from luthier.gates import Evidence, Verdict


class Params(plugins.Params):
    metric: Literal["accuracy", "f1", "precision", "recall", "kappa", "reward"] = "accuracy"
    minimum: float = Field(allow_inf_nan=False)
    bound: Literal["point", "low"] = Field(default="point", description="`low`: the 95 % interval's low end")

    @model_validator(mode="after")
    def _a_share_lies_below_1(self) -> Params:
        if self.metric != "reward" and not -1 <= self.minimum <= 1:
            raise ValueError(f"`minimum` is {self.minimum:g}; {self.metric} lies between -1 and 1")
        return self


def check(params: Params, evidence: Evidence) -> Verdict:
    tuned = evidence.scorecard["systems"]["tuned"]
    if params.bound == "low" and params.metric not in ("accuracy", "reward"):
        return Verdict(False, f"there is no interval for {params.metric}; use bound: point")
    if tuned.get(params.metric) is None:
        asked = "a `grader`" if params.metric == "reward" else "`evaluate.labels` and `evaluate.positive`"
        return Verdict(False, f"{params.metric} was not measured; set {asked}")
    found = tuned["low"] if params.bound == "low" else tuned[params.metric]
    name = f"{params.metric}{' (low end of its interval)' if params.bound == 'low' else ''}"
    verb = "reaches" if found >= params.minimum else "is below"
    return Verdict(
        found >= params.minimum,
        f"{name} {found:.4f} {verb} the floor {params.minimum}",
        {"metric": params.metric, "found": found, "minimum": params.minimum, "bound": params.bound},
    )
