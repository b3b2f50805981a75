"""The benchmark's figures from its raw runs: medians, spread, ratios, time to equal loss; and the table.

    python bench/table.py bench/results/NAME.json

A median is over the rounds, the spread is their lowest and highest. Time to equal held-out loss: the highest
of the systems' best losses is the mark that all of them reach; the time at which a system crosses it is
interpolated between its two looks around it. It does not know how runs are made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

OURS = "luthier"


def summary(result: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{workload: {system: figures}} for what has run so far."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for workload in dict.fromkeys(run["workload"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["workload"] == workload]
        names = dict.fromkeys(run["system"] for run in runs)
        systems = {name: _figures([run for run in runs if run["system"] == name]) for name in names}
        _compare(systems)
        found[workload] = systems
    return found


def _figures(runs: list[dict[str, Any]]) -> dict[str, Any]:
    good = [run for run in runs if "failed" not in run]
    if not good:
        return {"failed": runs[-1]["failed"].strip().splitlines()[-1]}
    rates, peaks = [run["tokens_per_s"] for run in good], [run["peak_rss_bytes"] / 1e9 for run in good]
    figures = {
        "runs": len(good),
        "failures": len(runs) - len(good),
        "tokens_per_s": round(median(rates), 1),
        "low": min(rates),
        "high": max(rates),
        "peak_gb": round(median(peaks), 2),
        "first_step_s": round(median(run["seconds"][0] for run in good), 1),
    }
    curves = [run["held_out"] for run in good if "held_out" in run]
    return figures | ({"held_out": curves} if curves else {})


def _compare(systems: dict[str, dict[str, Any]]) -> None:
    """Add each system's ratio to luthier, and its time to the loss that all of them reach."""
    ours = systems.get(OURS, {}).get("tokens_per_s")
    for figures in systems.values():
        if ours and "tokens_per_s" in figures:
            figures["of_luthier"] = round(figures["tokens_per_s"] / ours, 3)
    curves = {name: figures.pop("held_out") for name, figures in systems.items() if "held_out" in figures}
    if not curves:
        return
    best = {name: median(min(look[2] for look in curve) for curve in some) for name, some in curves.items()}
    mark = max(max(min(look[2] for look in curve) for curve in some) for some in curves.values())
    for name, some in curves.items():
        systems[name]["best_held_out"] = round(best[name], 4)
        systems[name]["equal_loss"] = round(mark, 4)
        systems[name]["equal_loss_s"] = round(median(crossing(curve, mark) for curve in some), 1)


def crossing(curve: list[list[float]], mark: float) -> float:
    """The time at which the loss first comes down to the mark (which it does)."""
    before = curve[0]
    for look in curve:
        if look[2] <= mark:
            fall = before[2] - look[2]
            share = (before[2] - mark) / fall if fall > 0 else 1.0
            return before[1] + share * (look[1] - before[1])
        before = look
    raise ValueError("the mark is below the whole curve")


def show(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines: list[str] = []
    for workload, systems in summary(result).items():
        timed = any("equal_loss_s" in figures for figures in systems.values())
        heads = ["system", "useful tokens/s", "spread", "of luthier", "peak RSS", "first step"]
        heads += ["to equal loss"] if timed else []
        lines += ["", f"### {workload}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, figures in systems.items():
            lines.append("| " + " | ".join(_cells(name, figures, timed)) + " |")
    return "\n".join(lines)


def _cells(name: str, figures: dict[str, Any], timed: bool) -> list[str]:
    if "failed" in figures:
        return [name, f"failed: {figures['failed'][:100].replace('|', ' ')}", *[""] * (5 if timed else 4)]
    cells = [
        name,
        f"{figures['tokens_per_s']:.0f}",
        f"{figures['low']:.0f}–{figures['high']:.0f}",
        f"{figures['of_luthier']:.2f}" if "of_luthier" in figures else "",
        f"{figures['peak_gb']:.1f} GB",
        f"{figures['first_step_s']:.0f} s",
    ]
    if timed:
        mark = f"{figures['equal_loss_s']:.0f} s to {figures['equal_loss']:.3f}"
        cells.append(mark if "equal_loss_s" in figures else "")
    return cells


def main() -> None:
    for name in sys.argv[1:]:
        print(show(json.loads(Path(name).read_text("utf-8"))))


if __name__ == "__main__":
    main()
