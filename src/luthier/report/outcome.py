"""What a run came to, in a word, a sentence and a caveat that comes first when a cheap baseline does better.

The rule of honesty: a baseline whose 95 % interval reaches the tuned model's is named in the headline; one
that scores at least as high opens it. This module does not know HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from luthier.report.folders import Record, ReportInput, mapping, records
from luthier.report.numbers import (
    DASH,
    clip,
    count,
    duration,
    interval,
    number,
    p_value,
    percent,
    points,
    size,
    visible,
)
from luthier.stages import ORDER

NAMES = {
    "base": "base",
    "best_prompt": "best prompt",
    "tfidf": "TF-IDF + logistic regression",
    "tuned": "tuned",
    "champion": "champion",
}
DOING = {
    "data": "reading the data",
    "model": "preparing the base model",
    "plan": "planning",
    "train": "training",
    "evaluate": "evaluating",
    "release": "deciding on the release",
    "monitor": "reading the request log",
}


@dataclass(frozen=True)
class Outcome:
    """`verdict` is the badge; `tone` is good, bad or open; `caveat` is None or a sentence of its own."""

    verdict: str
    tone: str
    sentence: str
    caveat: str | None
    caveat_first: bool


UNTUNED = {"base": "base", "best_prompt": "the base’s best prompt"}


def system_name(key: str) -> str:
    return NAMES.get(key) or visible(key).replace("_", " ")


def systems(record: ReportInput) -> list[tuple[str, Record]]:
    """The scorecard's systems in reading order: base, the cheap ones, tuned, champion."""
    found = {key: mapping(entry) for key, entry in mapping(record.scorecard.get("systems")).items()}
    cheap = [key for key in NAMES if key in found and key not in ("base", "tuned", "champion")]
    cheap += [key for key in found if key not in NAMES]
    order = ["base", *cheap, "tuned", "champion"]
    return [
        (key, found[key]) for key in order if key in found and number(found[key].get("accuracy")) is not None
    ]


def halted_at(record: ReportInput) -> str | None:
    """The first stage without a record: where a run that did not finish was at work."""
    return next((stage for stage in ORDER if not record.stage(stage)), None)


def outcome(record: ReportInput) -> Outcome:
    status = str(record.run.get("status") or "unknown")
    scores, caveat, first = _comparison(record)
    refused = [verdict for verdict in verdicts(record) if not verdict.get("passed")]
    if record.release and (refused or record.release.get("accepted") is False):
        said = "; ".join(f"{visible(item.get('gate'))}: {visible(item.get('reason'))}" for item in refused)
        return Outcome(
            "refused", "bad", _join(f"Refused by {said}." if said else "Refused.", scores), caveat, first
        )
    if status in ("failed", "interrupted", "refused"):
        stage = halted_at(record)
        doing = f" while {DOING[stage]}" if stage else ""
        reason = clip(visible(str(record.run.get("error") or "no reason recorded").split("\n")[0]), 300)
        verb = {"failed": "failed", "interrupted": "was interrupted", "refused": "was refused"}[status]
        return Outcome(
            status, "bad", _join(f"The run {verb}{doing}: {reason.rstrip('.')}.", scores), caveat, first
        )
    if record.release.get("accepted"):
        return Outcome("accepted", "good", scores or "All gates passed.", caveat, first)
    verdict = "running" if status == "running" else "not released"
    return Outcome(verdict, "open", scores or "The run ended before anything was evaluated.", caveat, first)


def verdicts(record: ReportInput) -> list[Record]:
    return records(record.release.get("verdicts"))


def _join(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _comparison(record: ReportInput) -> tuple[str, str | None, bool]:
    """The tuned model against the base, then what must be said about cheaper ways and the champion."""
    found = dict(systems(record))
    tuned = found.get("tuned")
    if tuned is None:
        return _reward(record), None, False
    key = untuned(found)
    base = found.get(key, {})
    rows = count(record.scorecard.get("rows"))
    pair = mapping(mapping(record.scorecard.get("paired")).get(f"tuned_vs_{key}"))
    before = f"{percent(base['accuracy'])} → " if base else ""
    within = f"95 % interval {interval(tuned.get('low'), tuned.get('high'))}"
    against = f", {p_value(pair.get('p'))} against {UNTUNED[key]}" if pair else ""
    what = "Accuracy" if margin(record) is None else "Preference accuracy"
    sentence = f"{what} {before}{percent(tuned['accuracy'])} on {rows} {_kind(record)} ({within}{against})."
    if base and float(tuned["accuracy"]) <= float(base["accuracy"]):
        sentence += " Tuning did not help."
    elif (number(pair.get("p")) or 0.0) >= 0.05:
        sentence += " This could be chance."
    sentence += _margin(record) + _against_champion(found, float(tuned["accuracy"]))
    caveat, first = _caveat(
        [(name, entry) for name, entry in found.items() if name not in ("base", "tuned", "champion")], tuned
    )
    return sentence, caveat, first


def margin(record: ReportInput) -> Record | None:
    """Where pairs were judged: the tuned model, whose implicit reward's margin is known."""
    tuned = mapping(mapping(record.scorecard.get("systems")).get("tuned"))
    return tuned if number(tuned.get("margin")) is not None else None


def _margin(record: ReportInput) -> str:
    tuned = margin(record)
    if tuned is None:
        return ""
    within = interval(tuned.get("preferred_low"), tuned.get("preferred_high"))
    return (
        f" The reward margin is {number(tuned['margin']):+.2f} nats a pair, above 0 in "
        f"{percent(tuned.get('preferred'))} of pairs (95 % interval {within})."
    )


def rewards(record: ReportInput) -> list[tuple[str, float, Record]]:
    """Where a grader judged: each system's mean reward, base first, and all that is known of it."""
    found = mapping(record.scorecard.get("systems"))
    named = [(key, mapping(found[key])) for key in ("base", "tuned") if key in found]
    return [(key, value, entry) for key, entry in named if (value := number(entry.get("reward"))) is not None]


def _reward(record: ReportInput) -> str:
    """The tuned model's mean reward against the base's, on the same prompts."""
    found = {key: (value, entry) for key, value, entry in rewards(record)}
    if "tuned" not in found or "base" not in found:
        return ""
    (before, _), (after, entry) = found["base"], found["tuned"]
    pair = mapping(mapping(record.scorecard.get("paired")).get("tuned_vs_base"))
    within = " to ".join(f"{number(entry.get(end)) or 0.0:.3f}" for end in ("low", "high"))
    sentence = (
        f"Mean reward {before:.3f} → {after:.3f} on {count(record.scorecard.get('rows'))} {_kind(record)} "
        f"(95 % interval {within}, {p_value(pair.get('p'))} against base)."
    )
    if after <= before:
        return sentence + " Tuning did not help."
    return sentence + (" This could be chance." if (number(pair.get("p")) or 0.0) >= 0.05 else "")


def untuned(found: Mapping[str, Record]) -> str:
    """What tuning is measured against: the base with its best prompt where that is known to be better."""
    prompted = float(found["best_prompt"]["accuracy"]) if "best_prompt" in found else -1.0
    return "best_prompt" if prompted >= float(found.get("base", {}).get("accuracy", 0.0)) else "base"


def _against_champion(found: dict[str, Record], tuned: float) -> str:
    if "champion" not in found:
        return ""
    rival = float(found["champion"]["accuracy"])
    return f" Against the champion ({percent(rival)}): {points(tuned - rival)}."


def _caveat(cheap: Sequence[tuple[str, Record]], tuned: Record) -> tuple[str | None, bool]:
    score, floor = float(tuned["accuracy"]), number(tuned.get("low"))
    better = [(key, entry) for key, entry in cheap if float(entry["accuracy"]) >= score]
    near = [
        (key, entry)
        for key, entry in cheap
        if (key, entry) not in better
        and (number(entry.get("high")) or 0.0) >= (score if floor is None else floor)
    ]
    if better:
        key, entry = max(better, key=lambda item: float(item[1]["accuracy"]))
        name, equal = _opening(key), float(entry["accuracy"]) == score
        how = (
            f"does just as well ({percent(score)})"
            if equal
            else f"scores higher: {percent(entry['accuracy'])}"
        )
        return f"{name} {how}{'' if equal else f' against {percent(score)}'}. Use it first.", True
    if near:
        key, entry = max(near, key=lambda item: float(item[1]["accuracy"]))
        return (
            f"{_opening(key)} reaches {percent(entry['accuracy'])}"
            f" ({interval(entry.get('low'), entry.get('high'))}; the intervals overlap): consider it first."
        ), False
    return None, False


def _opening(key: str) -> str:
    return {"best_prompt": "The best prompt on the untuned base"}.get(key) or system_name(key)


@dataclass(frozen=True)
class Tile:
    value: str
    label: str
    note: str


def _kind(record: ReportInput) -> str:
    """What the rows of the examination were to the model."""
    kinds = {"validation": "validation rows", "train": "rows it was trained on"}
    return kinds.get(str(record.scorecard.get("split")), "held-out rows")


def tiles(record: ReportInput) -> list[Tile]:
    """The few figures one looks for first; a figure that was not measured has no tile."""
    found = dict(systems(record))
    tuned, base = found.get("tuned", {}), found.get(untuned(found), {})
    train, said = record.facts("train"), []
    graded = {key: value for key, value, _ in rewards(record)}
    if "tuned" in graded and "base" in graded:
        gain = f"{graded['tuned'] - graded['base']:+.3f} over base"
        said.append(Tile(f"{graded['tuned']:.3f}", "mean reward", gain))
    if tuned:
        gain = (
            points(float(tuned["accuracy"]) - float(base["accuracy"])) + f" over {UNTUNED[untuned(found)]}"
            if base
            else _kind(record)
        )
        said.append(Tile(percent(tuned["accuracy"]), "accuracy", gain))
    if (judged := margin(record)) is not None:
        ahead = f"above 0 in {percent(judged.get('preferred'))} of pairs"
        said.append(Tile(f"{number(judged['margin']):+.2f}", "reward margin, in nats", ahead))
    if number(tuned.get("f1")) is not None:
        positive = record.scorecard.get("positive")
        about = f"for “{clip(visible(positive), 24)}”" if positive else "over all labels"
        said.append(Tile(percent(tuned["f1"]), "F1", about))
    if number(train.get("train_seconds")) is not None:
        pace = number(train.get("tokens_per_s"))
        note = f"{count(pace)} tokens/s" if pace else "optimiser at work"
        said.append(Tile(duration(train["train_seconds"]), "training", note))
    if number(train.get("peak_rss_bytes")) is not None:
        said.append(Tile(size(train["peak_rss_bytes"]), "peak memory", "while training"))
    if number(record.efficiency.get("adapter_bytes")) is not None:
        said.append(Tile(size(record.efficiency["adapter_bytes"]), "adapter", _beside(record)))
    return said


def _beside(record: ReportInput) -> str:
    base = number(record.efficiency.get("base_bytes"))
    return f"beside a base of {size(base)}" if base else DASH
