"""Charts as inline SVG: loss curves and bars with whiskers. No script, no font, no colour of their own.

The charts are fluid: positions along x are percentages and text keeps its size, so the same drawing serves
a phone and a wide screen; only paths live in a stretched inner viewport, with strokes that do not scale.
Colours come from the page's classes, so one drawing serves light and dark. Bars always start at zero.
It knows numbers and labels, not files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from luthier.report.numbers import count, interval, percent

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """One system's score: a share of 1 with its 95 % interval, if it has one. `main` takes the accent."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    main: bool = False


def tag(name: str, inner: str = "", /, **attributes: object) -> Markup:
    """One SVG element; `inner` must be Markup to count as elements, else it is text and is escaped."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attr(item))}"' for key, item in attributes.items()
    )
    return Markup(f"<{name}{pairs}>{escape(inner)}</{name}>")


def _attr(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def picture(key: str, title: str, desc: str, parts: Sequence[str], **attributes: object) -> Markup:
    """An `<svg>` that says what it shows to those who cannot see it."""
    inner = Markup("").join(
        [tag("title", title, id=f"{key}-title"), tag("desc", desc, id=f"{key}-desc"), *map(Markup, parts)]
    )
    return tag("svg", inner, role="img", aria_labelledby=f"{key}-title {key}-desc", **attributes)


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) covering low … high."""
    span = (high - low) or abs(high) or 1.0
    raw = span / max(wanted, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from just below low to just above high; fewer when there are many."""
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = [factor * 10.0**power for power in range(bottom, top + 1) for factor in (1, 2, 5)]
    floor = max((tick for tick in every if tick <= low), default=every[0])
    roof = min((tick for tick in every if tick >= high), default=every[-1])
    inside = [tick for tick in every if floor <= tick <= roof]
    return inside if len(inside) <= 7 else [tick for tick in inside if tick in (floor, roof) or _decade(tick)]


def _decade(value: float) -> bool:
    return abs(math.log10(value) - round(math.log10(value))) < 1e-9


def smooth(points: Points, share: float = 0.05) -> list[tuple[float, float]]:
    """A moving mean over `share` of the points on either side; nearer to an end, over fewer."""
    reach = max(1, round(len(points) * share))
    means = []
    for at, (x, _) in enumerate(points):
        width = max(2, min(reach, at, len(points) - 1 - at))
        window = [y for _, y in points[max(0, at - width) : at + width + 1]]
        means.append((x, sum(window) / len(window)))
    return means


@dataclass(frozen=True)
class _Frame:
    """Where data lie on the drawing: x as a percentage of the width, y in pixels from the top."""

    steps: float
    low: float
    high: float
    height: float
    log: bool

    def x(self, step: float) -> float:
        return 100.0 * step / self.steps

    def y(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(max(value, self.low)) if self.log else value
        return self.height * (1.0 - (at - low) / (high - low))

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x) * 10:.1f} {self.y(y):.1f}" for x, y in points)


@dataclass(frozen=True)
class Measure:
    """What a curve shows, its unit, and which end of it is the good one."""

    name: str = "loss"
    unit: str = " nats per token"
    rises: bool = False


LOSS, REWARD = Measure(), Measure("reward", "", rises=True)


def curves(train: Points, validation: Points, best: float | None, measure: Measure = LOSS) -> Markup:
    """Training loss faint, its moving mean over it, validation as points, the best step marked."""
    height = 280
    mean = smooth(train)
    drawn = [y for _, y in [*train, *validation]]
    low, high = min(drawn), max(drawn)
    log = low > 0 and high / low > 12
    marks = log_ticks(low, high) if log else ticks(0.0 if low >= 0 else low, high)
    last = max(x for x, _ in [*train, *validation])
    frame = _Frame(max(last, 1.0), marks[0], marks[-1], float(height), log)
    parts = [*_grid(frame, marks), *_best(frame, validation, best)]
    inner = [tag("path", d=frame.path(train), class_="faint")] if train else []
    inner += [tag("path", d=frame.path(mean), class_="line accent")] if mean else []
    inner += [tag("path", d=frame.path(validation), class_="line ink")] if len(validation) > 1 else []
    parts.append(
        tag(
            "svg",
            Markup("").join(inner),
            viewBox=f"0 0 1000 {height}",
            preserveAspectRatio="none",
            width="100%",
            height=height,
            overflow="visible",
            aria_hidden="true",
        )
    )
    parts += [
        tag("circle", cx=f"{frame.x(x):.2f}%", cy=frame.y(y), r=5.5 if x == best else 3.5, class_="dot")
        for x, y in validation
    ]
    desc = _story(train, mean, validation, best, (measure, log))
    return picture(
        "curve",
        f"{measure.name.capitalize()} over training",
        desc,
        parts,
        width="100%",
        height=height + 46,
        class_="curves",
    )


def _story(
    train: Points, mean: Points, validation: Points, best: float | None, how: tuple[Measure, bool]
) -> str:
    (measure, log), said = how, []
    if train:
        said.append(
            f"Training {measure.name} goes from {train[0][1]:.3f} to {mean[-1][1]:.3f}{measure.unit}"
            f" over {count(train[-1][0])} steps."
        )
    if validation:
        x, y = (max if measure.rises else min)(validation, key=lambda point: point[1])
        end = "highest" if measure.rises else "lowest"
        said.append(f"Validation {measure.name} is {end} at step {count(x)}: {y:.4f}{measure.unit}.")
    if best is not None:
        said.append(f"The kept adapter is that of step {count(best)}.")
    return " ".join([*said, f"The {measure.name} axis is logarithmic."] if log else said)


def _grid(frame: _Frame, marks: Sequence[float]) -> list[Markup]:
    parts = []
    for mark in marks:
        y = frame.y(mark)
        base = mark == marks[0]
        parts.append(tag("line", x1="0", x2="100%", y1=y, y2=y, class_="axis" if base else "grid"))
        parts.append(tag("text", f"{mark:.10g}", x="0", dx=-10, y=y, dy="0.34em", text_anchor="end"))
    steps = [step for step in ticks(0.0, frame.steps, 5) if step <= frame.steps]
    for step in steps:
        anchor = "start" if step == 0 else "end" if step > 0.97 * frame.steps else "middle"
        parts.append(
            tag("text", count(step), x=f"{frame.x(step):.2f}%", y=frame.height + 22, text_anchor=anchor)
        )
    return [
        *parts,
        tag("text", "optimiser steps", x="50%", y=frame.height + 42, text_anchor="middle", class_="unit"),
    ]


def _best(frame: _Frame, validation: Points, best: float | None) -> list[Markup]:
    if best is None:
        return []
    at = f"{frame.x(best):.2f}%"
    loss = next((y for x, y in validation if x == best), None)
    label = f"best: step {count(best)}" + (f", {loss:.4f}" if loss is not None else "")
    right = frame.x(best) > 60
    return [
        tag("line", x1=at, x2=at, y1=0, y2=frame.height, class_="best"),
        tag(
            "text",
            label,
            x=at,
            dx=-8 if right else 8,
            y=12,
            text_anchor="end" if right else "start",
            class_="strong",
        ),
    ]


def track(key: str, metric: str, bar: Bar, reference: float | None = None) -> Markup:
    """One bar from 0 to 100 % with its whisker; `reference` is drawn as a dotted line over the track."""
    parts = [
        tag("rect", x="0", y=7, width="100%", height=14, rx=3, class_="rail"),
        tag(
            "rect",
            x="0",
            y=7,
            width=f"{bar.value * 100:.3f}%",
            height=14,
            rx=3,
            class_="bar main" if bar.main else "bar",
        ),
    ]
    if reference is not None:
        at = f"{reference * 100:.3f}%"
        parts.append(tag("line", x1=at, x2=at, y1=0, y2=28, class_="reference"))
    if bar.low is not None and bar.high is not None:
        low, high = f"{bar.low * 100:.3f}%", f"{bar.high * 100:.3f}%"
        parts.append(tag("line", x1=low, x2=high, y1=14, y2=14, class_="halo"))
        parts.append(tag("line", x1=low, x2=high, y1=14, y2=14, class_="whisker"))
        parts += [tag("line", x1=end, x2=end, y1=9, y2=19, class_="whisker") for end in (low, high)]
    within = f"; 95 % interval {interval(bar.low, bar.high)}" if bar.low is not None else ""
    return picture(
        key,
        f"{bar.label}, {metric}",
        f"{percent(bar.value)}{within}",
        parts,
        width="100%",
        height=28,
        class_="track",
    )


def f1_interval(
    confusion: Mapping[str, Mapping[str, int]], positive: str
) -> tuple[float, float, float] | None:
    """F1 with its 95 % Wilson interval, from a confusion table.

    F1 = 2J/(1 + J) where J = TP/(TP + FP + FN) is a plain share of the rows that are or are said to be
    positive; so Wilson's interval for J (1927, z = 1.96), carried through that rising map, is one for F1.
    """
    if positive not in confusion:
        return None
    hits = confusion[positive].get(positive, 0)
    union = sum(confusion[positive].values())
    union += sum(said.get(positive, 0) for gold, said in confusion.items() if gold != positive)
    if union <= 0:
        return None
    share, z = hits / union, 1.959964
    centre = share + z * z / (2 * union)
    reach = z * math.sqrt(share * (1 - share) / union + z * z / (4 * union * union))
    bounds = [(centre + side * reach) / (1 + z * z / union) for side in (-1, 1)]
    low, high = (2 * bound / (1 + bound) for bound in (max(0.0, bounds[0]), min(1.0, bounds[1])))
    return 2 * share / (1 + share), low, high
