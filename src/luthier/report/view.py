"""From a run's plain values to what the page shows: rows of text and drawings, section by section.

A section that has nothing to show is empty, and the template says why. All text stays plain `str` here;
the template escapes it. This module does not know where files are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from luthier.report import charts
from luthier.report.dataset import dataset, source_name, source_pin
from luthier.report.folders import Record, ReportInput, mapping, records
from luthier.report.lineage import Node, graph
from luthier.report.numbers import (
    DASH,
    THIN,
    clip,
    count,
    duration,
    named,
    number,
    percent,
    plain,
    rate,
    short,
    signed_percent,
    size,
    visible,
)
from luthier.report.outcome import halted_at, outcome, tiles, verdicts
from luthier.report.scores import LIMIT, confusions, examples, majority, metrics, notes, pairs
from luthier.stages import ORDER


@dataclass(frozen=True)
class Step:
    """One cell of the stage strip; `state` is done, reused, failed or absent."""

    name: str
    time: str
    state: str
    share: float


def contents(record: ReportInput) -> dict[str, Any]:
    """Everything the template names."""
    return {
        "name": visible(record.run.get("name") or "unnamed run"),
        "run_id": visible(record.run.get("run_id") or DASH),
        "when": _when(record),
        "outcome": outcome(record),
        "tiles": tiles(record),
        "steps": _steps(record),
        "halted": _halted(record),
        "curve": _curve(record),
        "measure": _measure(record),
        "validation": [
            (count(step), f"{value:.4f}") for step, value in _points(record.validation, _measure(record))
        ],
        "metrics": metrics(record),
        "majority": majority(record),
        "pairs": pairs(record),
        "notes": notes(record),
        "rows": count(record.scorecard.get("rows")),
        "confusions": confusions(record),
        "examples": examples(record),
        "limit": LIMIT,
        "gates": _gates(record),
        "about": _about(record),
        "forecast": _forecast(record),
        "decisions": _decisions(record),
        "efficiency": _efficiency(record),
        "data": dataset(record.card),
        "lineage": graph(_nodes(record)),
        "monitor": _monitor(record),
        "recipe": _recipe(record),
        "machine": _machine(record),
        "problems": [visible(problem) for problem in record.problems],
    }


def _when(record: ReportInput) -> str:
    """`2025-11-22 01:30 UTC, 12 min 05 s`, as far as it is known."""
    begun, ended = (_time(record.run.get(key)) for key in ("started_at", "finished_at"))
    if begun is None:
        return ""
    took = f", {duration((ended - begun).total_seconds())}" if ended else ""
    return f"{begun:%Y-%m-%d %H:%M} UTC{took}"


def _time(text: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)


def _halted(record: ReportInput) -> str:
    """Which stages left nothing, so that a missing section is not taken for an empty result."""
    absent = [stage for stage in ORDER if not record.stage(stage)]
    if not absent:
        return ""
    names = " and ".join(filter(None, [", ".join(absent[:-1]), absent[-1]]))
    return f"Not completed: {names}. Sections that need {'it' if len(absent) == 1 else 'them'} are left out."


def _steps(record: ReportInput) -> list[Step]:
    seconds = {stage: number(record.stage(stage).get("seconds")) or 0.0 for stage in ORDER}
    whole = sum(seconds.values()) or 1.0
    broken = halted_at(record) if record.run.get("status") in ("failed", "interrupted") else None
    steps = []
    for stage in ORDER:
        entry = record.stage(stage)
        state = (
            "reused"
            if entry.get("reused")
            else "done"
            if entry
            else "failed"
            if stage == broken
            else "absent"
        )
        if stage == "release" and entry and record.release.get("accepted") is False:
            state = "refused"
        time = duration(entry.get("seconds")) if entry else "not reached"
        time = {"reused": "reused", "failed": "stopped here"}.get(state, time)
        steps.append(Step(stage, time, state, seconds[stage] / whole))
    return steps


def _measure(record: ReportInput) -> charts.Measure:
    """The reward, where training was after one; the loss else."""
    return charts.REWARD if any("reward" in row for row in record.curve) else charts.LOSS


def _points(rows: Sequence[Record], measure: charts.Measure) -> list[tuple[float, float]]:
    pairs = [(number(row.get("step")), number(row.get(measure.name))) for row in rows]
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _curve(record: ReportInput) -> Markup | None:
    measure = _measure(record)
    train, validation = _points(record.curve, measure), _points(record.validation, measure)
    if not train and not validation:
        return None
    return charts.curves(train, validation, number(record.facts("train").get("best_step")), measure)


def _gates(record: ReportInput) -> list[tuple[bool, str, str, list[tuple[str, str]]]]:
    return [
        (
            bool(item.get("passed")),
            visible(item.get("gate")),
            visible(item.get("reason") or ""),
            _facts(mapping(item.get("evidence"))),
        )
        for item in verdicts(record)
    ]


def _facts(found: Record, limit: int = 160) -> list[tuple[str, str]]:
    pairs = (named(str(name), value) for name, value in found.items())
    return [(label, clip(value, limit)) for label, value in pairs]


def _forecast(record: ReportInput) -> list[tuple[str, str, str, str]]:
    """What the plan foresaw, what came, and by how much the plan was off."""
    train, plan = record.facts("train"), record.plan
    foreseen = record.prediction
    pairs = (
        ("peak memory", foreseen.get("peak_gb"), train.get("peak_rss_bytes"), 1e9, size),
        ("training time", foreseen.get("minutes"), train.get("train_seconds"), 60.0, duration),
        ("tokens trained on", plan.get("tokens"), train.get("useful_tokens"), 1.0, count),
        ("tokens after packing", plan.get("computed_tokens"), train.get("computed_tokens"), 1.0, count),
        ("optimiser steps", plan.get("steps"), train.get("steps"), 1.0, count),
        ("energy", *_spent(foreseen, train, "energy_kwh"), 1.0, _kwh),
        ("money, at the prices given", *_spent(foreseen, train, "money"), 1.0, plain),
    )
    rows = []
    for label, planned, came, scale, shown in pairs:
        expected, actual = number(planned), number(came)
        if expected is None and actual is None:
            continue
        off = signed_percent(expected * scale / actual - 1) if expected is not None and actual else DASH
        rows.append((label, shown(None if expected is None else expected * scale), shown(actual), off))
    return rows


def _spent(foreseen: Record, train: Record, kind: str) -> tuple[float | None, float | None]:
    """What goes with time: foreseen, and the same for the time it really took."""
    planned, minutes = number(foreseen.get(kind)), number(foreseen.get("minutes"))
    seconds = number(train.get("train_seconds"))
    if planned is None or not minutes or seconds is None:
        return planned, None
    return planned, planned * seconds / 60 / minutes


def _kwh(value: object) -> str:
    found = number(value)
    return DASH if found is None else f"{found:.3g}{THIN}kWh"


def _kinds(record: ReportInput) -> list[tuple[str, str]]:
    """The bytes that the plan foresaw, by kind, and the operations."""
    foreseen = mapping(record.prediction.get("bytes")).items()
    found = [(f"{visible(kind)} (planned)", size(value)) for kind, value in foreseen if number(value)]
    work = number(mapping(record.prediction.get("operations")).get("total"))
    if work:
        found.append(("operations (planned)", f"{work / 1e12:,.2f}{THIN}× 10¹²"))
    return found


def _decisions(record: ReportInput) -> list[tuple[str, str]]:
    """What the plan chose, beside what it foresaw."""
    plan = record.plan
    parameters, share = plan.get("trainable_parameters"), plan.get("trainable_share")
    rows = [
        ("rows in a step", count(plan.get("batch"))),
        ("longest row", _unit(plan.get("longest_row"), "tokens")),
        ("largest micro-batch", _unit(plan.get("largest_micro_batch"), "tokens")),
        ("weights that train", f"{count(parameters)} ({percent(share)})" if number(parameters) else DASH),
        ("number type", visible(plan.get("dtype") or DASH)),
        ("threads", count(plan.get("threads"))),
        ("checkpointing", visible(plan.get("checkpointing") or DASH)),
        *_kinds(record),
    ]
    return [(label, value) for label, value in rows if value != DASH]


def _unit(value: object, unit: str) -> str:
    return DASH if number(value) is None else f"{count(value)}{THIN}{unit}"


def _efficiency(record: ReportInput) -> list[tuple[str, str]]:
    found, rows = record.efficiency, []
    latency, first = mapping(found.get("latency")), mapping(found.get("first_token"))
    for part in ("p50", "p95", "p99"):
        rows.append((f"answer, {part}", duration(latency.get(part, found.get(f"latency_{part}")))))
    for part in ("p50", "p95"):
        rows.append((f"first token, {part}", duration(first.get(part, found.get(f"first_token_{part}")))))
    rows += [
        ("generation", rate(found.get("tokens_per_s"))),
        ("peak memory", size(found.get("peak_rss_bytes"))),
        ("adapter on disk", size(found.get("adapter_bytes"))),
        ("base on disk", size(found.get("base_bytes"))),
        ("timed requests", count(found.get("requests"))),
        ("errors among them", count(found.get("errors"))),
    ]
    return [(label, value) for label, value in rows if value != DASH]


def _nodes(record: ReportInput) -> dict[str, Node]:
    """The boxes of the lineage; a source's and the base's digest are those their stages recorded."""
    details = {
        "data": _total(record),
        "model": visible(record.base.get("dtype") or ""),
        "plan": f"{count(record.plan.get('steps'))} steps",
        "train": f"kept step {count(record.facts('train').get('best_step'))}",
        "evaluate": f"{count(record.scorecard.get('rows'))} rows",
        "release": outcome(record).verdict,
    }
    titles = {"train": "adapter", "evaluate": "scorecard"}
    nodes = {}
    for stage, detail in details.items():
        entry = record.stage(stage)
        told = detail if entry else "not reached"
        nodes[stage] = Node(
            titles.get(stage, stage), told, short(entry.get("digest")), bool(entry), stage == "release"
        )
    sources = records(record.card.get("sources"))
    more = f" +{len(sources) - 1}" if len(sources) > 1 else ""
    named_by = source_name(sources[0]) + more if sources else "not reached"
    nodes["sources"] = Node("sources", named_by, source_pin(sources[0]) if sources else DASH, bool(sources))
    nodes["base"] = Node(
        "base",
        visible(record.base.get("architecture") or ""),
        short(record.base.get("digest")),
        bool(record.base),
    )
    return nodes


def _total(record: ReportInput) -> str:
    rows = [number(value) or 0.0 for value in mapping(record.facts("data").get("rows")).values()]
    return f"{count(sum(rows))} rows" if rows else ""


def _monitor(record: ReportInput) -> dict[str, Any]:
    """Each signal's verdict (yes, no or open) with its reading, and the counts of the log."""
    if not record.monitor:
        return {}
    signals = [_signal(item) for item in records(record.monitor.get("signals"))]
    return {
        "signals": signals,
        "advice": any(signal[3] for signal in signals),
        "rest": _facts(mapping(record.monitor.get("volume"))),
    }


def _signal(item: Record) -> tuple[str, str, list[str], str]:
    verdict = "open" if item.get("ok") is None else "yes" if item["ok"] else "no"
    name = visible(item.get("signal") or DASH)
    shown = duration if name.endswith("(s)") else percent if name.endswith("rate") else plain
    readings = [shown(item.get(key)) for key in ("value", "baseline", "limit")]
    return verdict, name.removesuffix(" (s)"), readings, visible(item.get("action") or "")


def _about(record: ReportInput) -> list[tuple[str, str]]:
    """What the model is for and what it must not be trusted with, in the recipe's own words."""
    said = mapping(mapping(record.run.get("recipe")).get("release"))
    pairs = (("Made for", said.get("intended_use")), ("Limits", said.get("limits")))
    return [(label, clip(visible(text), 600)) for label, text in pairs if text]


def _recipe(record: ReportInput) -> str:
    found = record.run.get("recipe")
    return json.dumps(found, indent=2, ensure_ascii=False, default=str) if found else ""


def _machine(record: ReportInput) -> list[tuple[str, str]]:
    probed = {
        name: value for name, value in mapping(record.prediction.get("host")).items() if name != "flags"
    }
    return _facts({**mapping(record.run.get("host")), **probed, **record.machine}, 200)
