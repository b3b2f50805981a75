"""The model card: what a release is for, is made of, and was judged by. A card with a hole blocks release.

Source: Mitchell et al., Model Cards for Model Reporting, arXiv 1810.03993. It fills in and checks a form;
it does not know where the facts come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROWS = {
    "test": "held-out rows",
    "validation": "validation rows",
    "train": "of the rows it was trained on: this shows what was learnt, not what it is worth elsewhere",
}
REQUIRED = ("name", "intended_use", "limits", "base", "data", "training", "evaluation", "gates", "lineage")


def missing(card: Mapping[str, Any]) -> list[str]:
    """The required fields that are absent or empty, one level deep."""
    holes = [field for field in REQUIRED if card.get(field) in (None, "", {}, [], ())]
    for field in REQUIRED:
        value = card.get(field)
        if isinstance(value, Mapping):
            holes += [f"{field}.{name}" for name, inner in value.items() if inner is None or inner == ""]
    return holes


def page(card: Mapping[str, Any]) -> str:
    """The card as Markdown for people."""
    base, data, training = card["base"], card["data"], card["training"]
    lines = [
        f"# {card['name']}",
        "",
        f"**Intended use.** {card['intended_use']}",
        "",
        f"**Limits.** {card['limits']}",
        "",
        "## Made of",
        f"- Base: {base['source']}, {base['architecture']}, {base['parameters']:,} parameters, "
        f"licence {base['licence']}, digest `{base['digest'][:16]}` (relation: adapter)",
        f"- Rows: {data['train']:,} to learn from, {data['validation']:,} to choose by, {data['test']:,} to "
        f"judge by; licences {', '.join(data['licences'])}; version `{data['version'][:16]}`",
        f"- Training: {training['objective']} with {training['method']}, {training['steps']} steps, "
        f"{training['useful_tokens']:,} tokens, seed {training['seed']}",
        *(
            ["- Answers with the base's weights rounded to int8", ""]
            if card.get("weights") == "int8"
            else [""]
        ),
        "## Judged by",
        *_scores(card["evaluation"]),
        "",
        "## Gates",
        *(f"- {'passed' if v['passed'] else 'REFUSED'} · {v['gate']}: {v['reason']}" for v in card["gates"]),
        "",
        "## Lineage",
        *(f"- {name}: `{digest}`" for name, digest in card["lineage"].items()),
        "",
    ]
    return "\n".join(lines)


def _scores(evaluation: Mapping[str, Any]) -> Sequence[str]:
    judged = f"{evaluation['rows']:,} {ROWS[evaluation['split']]}."
    if any("reward" in score for score in evaluation["systems"].values()):
        return [judged, "", *_rewards(evaluation["systems"])]
    rows = [
        judged,
        "",
        "| system | accuracy | 95 % interval | F1 |",
        "|-|-|-|-|",
    ]
    for name, score in evaluation["systems"].items():
        f1 = "" if score["f1"] is None else f"{score['f1']:.3f}"
        rows.append(f"| {name} | {score['accuracy']:.1%} | {score['low']:.1%} – {score['high']:.1%} | {f1} |")
    return rows


def _rewards(systems: Mapping[str, Any]) -> list[str]:
    """What a grader gave each system's answers."""
    rows = ["| system | mean reward | 95 % interval |", "|-|-|-|"]
    for name, score in systems.items():
        rows.append(f"| {name} | {score['reward']:.4f} | {score['low']:.4f} – {score['high']:.4f} |")
    return rows
