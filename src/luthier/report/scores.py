"""How well the systems did: bars, confusion tables, and rows won and lost, ready for the page.

Which rows are shown is not a matter of taste: the first few by row id, which is a hash of the content.
This module does not know HTML; all text stays plain `str` and the template escapes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from luthier.report import charts
from luthier.report.folders import Record, ReportInput, mapping
from luthier.report.numbers import clip, count, interval, number, p_value, percent, visible
from luthier.report.outcome import system_name, systems

LIMIT = 8
CALLS = {
    "hallucinated": "of functions that do not exist",
    "wrong_function": "of another function",
    "wrong_arguments": "with other arguments",
    "missing": "not made",
    "unasked": "not asked for",
}
TEXT_LIMIT = 320


@dataclass(frozen=True)
class Score:
    label: str
    value: str
    within: str
    drawing: Markup
    main: bool


@dataclass(frozen=True)
class Table:
    """A confusion table: what was right down the side, what was said along the top."""

    label: str
    said: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str, float, bool], ...]], ...]


@dataclass(frozen=True)
class Sample:
    where: str
    text: str
    gold: str
    answers: tuple[tuple[str, str, bool], ...]


def metrics(record: ReportInput) -> list[tuple[str, str, list[Score]]]:
    """Accuracy and F1, each a row a system, on a scale from 0 to 100 %."""
    found = systems(record)
    line = _majority(found)
    panels = [("Accuracy", "", [_score("accuracy", key, entry, record, line) for key, entry in found])]
    with_f1 = [(key, entry) for key, entry in found if number(entry.get("f1")) is not None]
    about = record.scorecard.get("positive")
    label = f"for the label “{clip(visible(about), 24)}”" if about else "over all labels"
    panels.append(("F1", label, [_score("f1", key, entry, record, None) for key, entry in with_f1]))
    return [panel for panel in panels if panel[2]]


def majority(record: ReportInput) -> tuple[str, str] | None:
    """What always giving the commonest right answer would score: the least any system must beat."""
    found = _majority(systems(record))
    return found and (clip(found[0], 24), percent(found[1]))


def pairs(record: ReportInput) -> list[tuple[str, str]]:
    """Every paired comparison of the scorecard: rows only one of the two got right, and the p-value."""
    told = []
    for name, entry in mapping(record.scorecard.get("paired")).items():
        first, _, second = str(name).partition("_vs_")
        label = f"{system_name(first)} against {system_name(second)}"
        only = f"{count(mapping(entry).get('wins'))} rows won, {count(mapping(entry).get('losses'))} lost"
        told.append((label, f"{only}, {p_value(mapping(entry).get('p'))} (paired test)"))
    return [*told, *_called(record), *_likelihoods(record)]


def _called(record: ReportInput) -> list[tuple[str, str]]:
    """How each system called the tools that its rows offer."""
    calls = mapping(record.scorecard.get("calls"))
    told = []
    for key, entry in mapping(calls.get("systems")).items():
        kinds = {kind: number(mapping(entry).get(kind)) or 0 for kind in CALLS}
        wrong = ", ".join(f"{count(kinds[kind])} {CALLS[kind]}" for kind in CALLS if kinds[kind])
        right = f"{count(mapping(entry).get('right'))} of {count(calls.get('rows'))} right"
        told.append((f"tool calls, {system_name(str(key))}", right + (f"; {wrong}" if wrong else "")))
    return told


def _likelihoods(record: ReportInput) -> list[tuple[str, str]]:
    """How surprised each model is by the right answers: a score that needs no label to be read."""
    loss, perplexity = mapping(record.scorecard.get("loss")), mapping(record.scorecard.get("perplexity"))
    told = []
    for key, value in loss.items():
        if (nats := number(value)) is not None:
            held = number(perplexity.get(key))
            also = f", perplexity {held:.4g}" if held is not None else ""
            told.append((f"held-out loss, {system_name(key)}", f"{nats:.4f} nats per token{also}"))
    return told


def _score(
    metric: str, key: str, entry: Record, record: ReportInput, line: tuple[str, float] | None
) -> Score:
    value = number(entry.get(metric)) or 0.0
    prefix = "" if metric == "accuracy" else f"{metric}_"
    low, high = number(entry.get(f"{prefix}low")), number(entry.get(f"{prefix}high"))
    if metric == "f1" and low is None:
        own = charts.f1_interval(_counts(entry), str(record.scorecard.get("positive")))
        # Only where the table gives the very F1 that was scored: else it is an interval for something else.
        low, high = own[1:] if own and abs(own[0] - value) < 5e-4 else (None, None)
    bar = charts.Bar(system_name(key), value, low, high, key == "tuned")
    drawing = charts.track(
        f"bar-{metric}-{key}", "accuracy" if metric == "accuracy" else "F1", bar, line and line[1]
    )
    return Score(bar.label, percent(value), interval(low, high) if low is not None else "", drawing, bar.main)


def _majority(found: Sequence[tuple[str, Record]]) -> tuple[str, float] | None:
    table = next(filter(None, (_counts(entry) for _, entry in found)), {})
    totals = {visible(gold): sum(said.values()) for gold, said in table.items()}
    whole = sum(totals.values())
    if len(totals) < 2 or not whole:
        return None
    label = max(totals, key=lambda gold: totals[gold])
    return label, totals[label] / whole


def notes(record: ReportInput) -> list[tuple[str, str]]:
    """What each system adds about itself, and how many of its answers were no label at all."""
    told = []
    for key, entry in systems(record):
        unparsed = number(entry.get("unparsed"))
        parts = [visible(entry["note"])] if entry.get("note") else []
        parts += [f"{count(unparsed)} answers were no label, counted as wrong"] if unparsed else []
        if parts:
            told.append((system_name(key), clip("; ".join(parts), 400)))
    return told


def confusions(record: ReportInput) -> list[Table]:
    """Base and tuned side by side, with the same columns, so that cells can be compared across."""
    found = dict(systems(record))
    tables = {key: _counts(found.get(key, {})) for key in ("base", "tuned")}
    golds = list(dict.fromkeys(gold for table in tables.values() for gold in table))
    heard = {str(name) for table in tables.values() for row in table.values() for name in row}
    said = golds + sorted(heard - set(golds))
    return [_table(key, table, said) for key, table in tables.items() if table]


def _counts(entry: Record) -> dict[str, dict[str, int]]:
    """A system's confusion table, with whole numbers only: gold → said → rows."""
    return {
        str(gold): {str(said): max(0, int(number(rows) or 0)) for said, rows in row.items()}
        for gold, row in mapping(entry.get("confusion")).items()
        if isinstance(row, Mapping)
    }


def _table(key: str, confusion: Mapping[str, Mapping[str, int]], said: Sequence[str]) -> Table:
    rows = []
    for gold, row in confusion.items():
        whole = sum(row.values()) or 1
        cells = tuple(
            (count(row.get(n, 0)), percent(row.get(n, 0) / whole), row.get(n, 0) / whole, n == gold)
            for n in said
        )
        rows.append((visible(gold), cells))
    return Table(system_name(key), tuple(_no_label(name) for name in said), tuple(rows))


def _no_label(name: str) -> str:
    return "no label" if name.lower() in ("", "none", "null", "unparsed") else visible(name)


def examples(record: ReportInput) -> list[tuple[str, str, str, list[Sample]]]:
    """Rows won and lost against the base, and those still wrong; the first few by row id, not hand-picked."""
    ways: dict[tuple[bool, bool], list[Record]] = {(False, True): [], (True, False): [], (False, False): []}
    for row in record.samples:
        said, gold = mapping(row.get("said")), row.get("gold")
        if "tuned" in said and "base" in said:
            ways.setdefault((said["base"] == gold, said["tuned"] == gold), []).append(row)
    titles = (
        ("Won", "base wrong, tuned right"),
        ("Lost", "base right, tuned wrong"),
        ("Still wrong", "both wrong"),
    )
    groups = []
    for (title, told), rows in zip(
        titles, (ways[False, True], ways[True, False], ways[False, False]), strict=True
    ):
        first = sorted(rows, key=lambda row: str(row.get("id")))[:LIMIT]
        groups.append((title, told, count(len(rows)), [_sample(row) for row in first]))
    return groups if any(group[3] for group in groups) else []


def _sample(row: Record) -> Sample:
    said, answers = mapping(row.get("said")), mapping(row.get("answers"))

    def shown(key: str) -> tuple[str, str, bool]:
        answer = said.get(key) if said.get(key) is not None else f"“{answers.get(key, '')}”"
        return key, clip(visible(answer), 80), said.get(key) == row.get("gold")

    text = clip(visible(row.get("prompt", "")), TEXT_LIMIT)
    return Sample(
        visible(row.get("where", "")),
        text,
        clip(visible(row.get("gold")), 80),
        (shown("base"), shown("tuned")),
    )
