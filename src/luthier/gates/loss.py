"""Loss gate: on the rows it was examined on, the tuned model's answers are not less likely than the base's.

It reads the scorecard's mean loss over answer tokens, so it needs neither labels nor exact answers. It does
not know which rows those were; the scorecard says (`split`).
"""

from __future__ import annotations

import math

from pydantic import Field

from luthier import plugins
from luthier.gates import Evidence, Verdict

SPLITS = {"train": "rows it was trained on", "validation": "validation rows"}


class Params(plugins.Params):
    tolerance: float = Field(default=0.0, ge=0, description="share by which the base's loss may be exceeded")


def check(params: Params, evidence: Evidence) -> Verdict:
    loss = evidence.scorecard["loss"]
    base, tuned = float(loss["base"]), float(loss["tuned"])
    rows = SPLITS.get(str(evidence.scorecard.get("split")), "held-out rows")
    limit = base * (1 + params.tolerance)
    found = {"base": base, "tuned": tuned, "limit": limit}
    passed = math.isfinite(tuned) and tuned <= limit
    verb = "is not above" if passed else "is above"
    return Verdict(passed, f"loss {tuned:.4f} on {rows} {verb} {limit:.4f} (the base: {base:.4f})", found)
