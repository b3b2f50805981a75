"""Lineage as a small graph: from the sources and the base to the release, each box with its short digest.

Two drawings of the same graph, left to right for wide pages and top to bottom for narrow ones; the page
shows one. It knows boxes and arrows, not stages' files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from luthier.report.charts import picture, tag
from luthier.report.numbers import clip

ARROWS = (
    ("sources", "data"),
    ("base", "model"),
    ("data", "plan"),
    ("model", "plan"),
    ("plan", "train"),
    ("train", "evaluate"),
    ("evaluate", "release"),
)
_WIDE = {
    "sources": (0.0, 0.0),
    "base": (0.0, 1.0),
    "data": (1.0, 0.0),
    "model": (1.0, 1.0),
    "plan": (2.0, 0.5),
    "train": (3.0, 0.5),
    "evaluate": (4.0, 0.5),
    "release": (5.0, 0.5),
}
_TALL = {
    "sources": (0.0, 0.0),
    "base": (1.0, 0.0),
    "data": (0.0, 1.0),
    "model": (1.0, 1.0),
    "plan": (0.5, 2.0),
    "train": (0.5, 3.0),
    "evaluate": (0.5, 4.0),
    "release": (0.5, 5.0),
}


@dataclass(frozen=True)
class Node:
    """A box: what it is, one line about it, and its short digest. Not `reached`: drawn as an outline."""

    title: str
    detail: str
    digest: str
    reached: bool = True
    main: bool = False


def graph(nodes: Mapping[str, Node]) -> tuple[Markup, Markup]:
    """The wide and the tall drawing."""
    return _draw(nodes, "wide", _WIDE, (148.0, 74.0), (182.0, 102.0)), _draw(
        nodes, "tall", _TALL, (166.0, 74.0), (182.0, 104.0)
    )


def _draw(
    nodes: Mapping[str, Node],
    key: str,
    places: Mapping[str, tuple[float, float]],
    box: tuple[float, float],
    pitch: tuple[float, float],
) -> Markup:
    corners = {name: (x * pitch[0] + 1, y * pitch[1] + 1) for name, (x, y) in places.items()}
    width = max(x for x, _ in corners.values()) + box[0] + 1
    height = max(y for _, y in corners.values()) + box[1] + 1
    parts = [_arrow(corners[start], corners[end], box, key == "tall") for start, end in ARROWS]
    parts += [_box(nodes[name], corners[name], box) for name in places]
    told = "; ".join(f"{nodes[name].title} {nodes[name].detail} {nodes[name].digest}" for name in places)
    return picture(
        f"lineage-{key}",
        "Lineage of this run",
        f"Sources and base lead through data, model, plan and adapter to the release. {told}",
        parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        class_=f"lineage {key}",
    )


def _arrow(start: Sequence[float], end: Sequence[float], box: tuple[float, float], tall: bool) -> Markup:
    if tall:
        x1, y1, x2, y2 = start[0] + box[0] / 2, start[1] + box[1], end[0] + box[0] / 2, end[1] - 5
        middle = (y1 + y2) / 2
        line = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"
        head = f"M{x2 - 4:.1f} {y2 - 2:.1f}L{x2:.1f} {y2 + 4:.1f}L{x2 + 4:.1f} {y2 - 2:.1f}Z"
    else:
        x1, y1, x2, y2 = start[0] + box[0], start[1] + box[1] / 2, end[0] - 5, end[1] + box[1] / 2
        middle = (x1 + x2) / 2
        line = f"M{x1:.1f} {y1:.1f}C{middle:.1f} {y1:.1f} {middle:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
        head = f"M{x2 - 2:.1f} {y2 - 4:.1f}L{x2 + 4:.1f} {y2:.1f}L{x2 - 2:.1f} {y2 + 4:.1f}Z"
    return tag("path", d=line, class_="edge") + tag("path", d=head, class_="head")


def _box(node: Node, corner: tuple[float, float], box: tuple[float, float]) -> Markup:
    x, y = corner
    kind = "node" + (" main" if node.main else "") + ("" if node.reached else " absent")
    return tag(
        "g",
        tag("rect", x=x, y=y, width=box[0], height=box[1], rx=8)
        + tag("text", node.title, x=x + 13, y=y + 24, class_="strong")
        + tag("text", clip(node.detail, int(box[0] / 7.4)), x=x + 13, y=y + 42, class_="detail")
        + tag("text", node.digest, x=x + 13, y=y + 60, class_="mono"),
        class_=kind,
    )
