"""What a person sees while a run works: one line a stage, a bar with loss, tokens/s, memory and ETA.

On a terminal it is drawn live; elsewhere each stage prints a line when it begins, every few seconds while
it works, and when it ends. It only shows `Event`s; it knows no stage.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from luthier.stages import ORDER, Event

EVERY_S = 10.0


class Watch:
    """A context manager whose `tell` draws events on `console` (stderr, so that stdout stays for results)."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.spoken = 0.0

    def __enter__(self) -> Watch:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def tell(self, event: Event) -> None:
        note = event.message + _figures(event.facts) if event.message != "reused" else "reused"
        if not self.console.is_terminal:
            self._say(event, note)
            return
        if event.stage not in self.tasks:
            self.tasks[event.stage] = self.bars.add_task(_title(event.stage), total=None, note="")
        ended = event.message in ("done", "reused")
        total, done = (1, 1) if ended else (event.total, event.done or 0)
        self.bars.update(self.tasks[event.stage], total=total, completed=done, note=note)

    def _say(self, event: Event, note: str) -> None:
        moving = event.done is not None and event.total is not None and event.done < event.total
        if moving and time.monotonic() - self.spoken < EVERY_S:
            return
        self.spoken = time.monotonic()
        count = f" {event.done}/{event.total}" if moving else ""
        self.console.print(f"{_title(event.stage):<9}{count} {note}", highlight=False, soft_wrap=True)


def _title(stage: str) -> str:
    return f"{ORDER.index(stage) + 1} {stage}" if stage in ORDER else stage


def _figures(facts: Mapping[str, Any]) -> str:
    """The few figures worth a glance, in a fixed order, each with its unit."""
    shown = (
        ("loss", "loss {:.4f}"),
        ("tokens_per_s", "{:,.0f} tok/s"),
        ("rss_gb", "{:.1f} GB"),
        ("lr", "lr {:.1e}"),
        ("eta_s", "ETA {}"),
    )
    words = []
    for name, form in shown:
        value = facts.get(name)
        if isinstance(value, int | float):
            words.append(form.format(clock(value) if name == "eta_s" else value))
    return "  " + "  ".join(words) if words else ""


def clock(seconds: float) -> str:
    """75 → '1:15'; 3675 → '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
