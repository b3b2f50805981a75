"""No-regression gate: better than the base model, and not worse than the release in production.

Both are judged on the very rows both answered, by the exact paired test of `statistics` (McNemar 1947 in
its binomial form; over rewards it is the sign test: rows whose reward rose against rows whose reward fell).
It does not know which release the champion is, nor how answers were made.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from luthier import plugins
from luthier.gates import Evidence, Verdict
from luthier.statistics import mcnemar, worse


class Params(plugins.Params):
    alpha: float = Field(default=0.001, gt=0, lt=1, description="p below this: better than the base")
    champion_alpha: float = Field(default=0.05, gt=0, lt=1, description="one-sided p below this: worse")
    tolerance: float = Field(
        default=0.005, ge=0, description="accuracy or reward that may be lost to the champion"
    )


def check(params: Params, evidence: Evidence) -> Verdict:
    rows: Mapping[str, Mapping[str, float]] = evidence.rewards or evidence.correct
    rivals = evidence.champion_rewards if evidence.rewards else evidence.champion_correct
    if not rows:
        return Verdict(False, "there are no per-row answers to compare")
    pairs = {row: (answers["base"], answers["tuned"]) for row, answers in rows.items()}
    wins, losses, p = _paired(pairs)
    found: dict[str, object] = {"base": {"wins": wins, "losses": losses, "p": p}}
    if wins <= losses or p >= params.alpha:
        return Verdict(False, f"not better than the base: {wins} won, {losses} lost, p = {p:.2g}", found)
    reason = f"better than the base ({wins} won, {losses} lost, p = {p:.2g})"
    if evidence.champion is None:
        return Verdict(True, f"{reason}; nothing is in production yet", found)
    if evidence.rewards and evidence.champion.get("grader") != evidence.scorecard.get("grader"):
        return Verdict(False, "another grader judged the release in production: no comparison", found)
    pairs = {row: (rivals[row]["tuned"], answers["tuned"]) for row, answers in rows.items() if row in rivals}
    if not pairs:
        return Verdict(False, "the release in production was examined on other rows: no comparison", found)
    wins, losses, _ = _paired(pairs)
    drop = sum(float(first) - float(second) for first, second in pairs.values()) / len(pairs)
    p = worse(wins, losses)
    found["champion"] = {"rows": len(pairs), "wins": wins, "losses": losses, "p_worse": p, "drop": drop}
    told = f"{wins} won, {losses} lost on {len(pairs)} shared rows"
    if p < params.champion_alpha or drop > params.tolerance:
        return Verdict(False, f"worse than the release in production: {told}, p = {p:.2g}", found)
    return Verdict(True, f"{reason}; not worse than production ({told})", found)


def _paired(pairs: Mapping[str, tuple[float, float]]) -> tuple[int, int, float]:
    """Rows the second did better on, rows the first did better on, and the exact p of that split."""
    wins = sum(second > first for first, second in pairs.values())
    losses = sum(first > second for first, second in pairs.values())
    return wins, losses, mcnemar(wins, losses)
