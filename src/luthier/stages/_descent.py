"""The `for` around `engine.loop`: what is looked at, noted and saved between two steps of a training.

It keeps the curve and the ledger of rows, looks at held-out loss (at step 0, every few steps and at the end),
keeps the best weights, saves checkpoints while training goes on, stops early or when asked: between two
micro-batches, dropping the step that is not finished. What follows a checkpoint depends on it alone.

A sick step stops the training or, by the recipe's `on_sick`, is skipped and stands in the ledger with its
reason. So many in a row are not the rows' fault and stop it all the same.

Every rank does all of this with the same numbers; what only some hold (a share of the weights, a request to
stop, a disk that is busy) all ask for at the same places. The first rank alone writes. It does not know what
the loss is, which weights move, or where rows and models come from.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import artifacts
from luthier.engine import checkpoint, heap, loop, memory, placement
from luthier.engine.placement import Placement
from luthier.engine.saver import Saver
from luthier.errors import Interrupted, TrainError
from luthier.forecast import pace
from luthier.stages import Event, _kept

CURVE, VALIDATION, LEDGER = "curve.jsonl", "validation.jsonl", "ledger.jsonl"
TIMINGS, SAVES = "timings.jsonl", "saves.jsonl"  # what the clock says: they go to `observed/`
JOURNALS = (CURVE, VALIDATION, LEDGER, TIMINGS, SAVES)
KEPT = "kept"
BEST = "best:"  # a checkpoint's tensors of this prefix are the best weights so far
IN_A_ROW = 8  # so many sick steps, one after the other, and it is not the rows


@dataclass(frozen=True)
class Work:
    """All that stays the same while training."""

    model: Any
    adam: torch.optim.AdamW
    loader: Any
    held_out: tuple[Any, ...]
    objective: loop.Objective
    settings: loop.Settings
    tokens: int
    phase: Any
    place: Placement
    folder: Path
    kept: frozenset[int]
    looks: tuple[int, ...]
    identity: str
    stopping: Callable[[], bool]
    tell: Callable[[Event], None]
    rollouts: Any = None


@dataclass
class Progress:
    """All that changes, beside weights and moments. A checkpoint holds what cannot be told from the rest."""

    step: int = 0
    looked: int = -1
    best: int | None = None
    best_loss: float | None = None
    misses: int = 0
    skipped: int = 0
    in_a_row: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    saved: int = -1
    late: bool = False
    computed: int = 0
    look_s: float = 0.0
    kept: list[tuple[int, str]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    journals: dict[str, bytearray] = field(default_factory=lambda: {name: bytearray() for name in JOURNALS})

    def state(self) -> dict[str, Any]:
        names = ("looked", "best", "best_loss", "misses", "skipped", "in_a_row", "seconds", "kept")
        return {name: getattr(self, name) for name in (*names, "peak_rss_bytes")}

    def note(self, journal: str, record: Mapping[str, Any]) -> None:
        self.journals[journal] += artifacts.canonical(record) + b"\n"

    def noted(self, journal: str) -> list[Any]:
        return [json.loads(line) for line in self.journals[journal].splitlines()]

    def last(self, journal: str, count: int) -> list[Any]:
        """The last `count` records, without reading those before."""
        return [json.loads(line) for line in self.journals[journal].rsplit(b"\n", count + 1)[-count - 1 : -1]]


def descend(work: Work, progress: Progress, saver: Saver) -> None:
    """Every step that is left, and between two of them: look at held-out loss, save, leave if asked to."""
    began = time.monotonic() - progress.seconds

    def pause() -> None:
        progress.seconds = time.monotonic() - began
        _note_peak(progress)
        _note_save(progress, saver, wait=False)
        looked = _look(work, progress)
        if looked:
            _keep(work, progress)
        ended = looked and (progress.step == work.settings.steps or _given_up(work, progress))
        asked = not ended and work.stopping()
        if asked or ended or progress.late or progress.step % work.phase.checkpoint_every == 0:
            _save(work, progress, saver, wait=asked or ended)
        if asked:
            raise Interrupted(
                f"training stopped at step {progress.step} of {work.settings.steps}; everything is saved",
                hint="run the same command again: it goes on from here",
            )

    try:
        pause()
        if not _given_up(work, progress):
            past = loop.Past(progress.step, tuple(row["loss"] for row in progress.noted(CURVE)))
            for step in loop.train(work.model, work.loader, work.objective, work.adam, work.settings, past):
                _record(work, progress, step)
                pause()
                if _given_up(work, progress):
                    break
    except loop.Asked:
        pause()
    progress.seconds = time.monotonic() - began
    _note_peak(progress)


def _note_peak(progress: Progress) -> None:
    progress.peak_rss_bytes = max(progress.peak_rss_bytes, memory.peak_rss_bytes())


def resume(work: Work) -> Progress:
    """Go on from the newest checkpoint that is whole; say which were not. Without one, begin afresh."""
    work.folder.mkdir(parents=True, exist_ok=True)
    found, skipped = checkpoint.newest(work.folder, work.identity)
    for line in skipped:
        work.tell(Event("train", line, 0, work.settings.steps))
    if len(set(work.place.each(found.step if found else -1))) > 1:
        raise TrainError("the processes read different checkpoints", where=str(work.folder))
    if found is None:
        return Progress()
    loop.restore(work.model, work.adam, found.tensors)
    trained = loop.trained(work.model)
    work.tell(Event("train", f"going on after step {found.step}", found.step, work.settings.steps))
    progress = Progress(
        **{name: found.state[name] for name in Progress().state()},
        step=found.step,
        saved=found.step,
        best_weights={
            f"weight:{name}": placement.part(found.tensors[f"{BEST}weight:{name}"], weight)
            for name, weight in trained.items()
            if f"{BEST}weight:{name}" in found.tensors
        },
        journals={name: bytearray(found.journals[name]) for name in JOURNALS},
    )
    if work.rollouts:
        work.rollouts.restore(found.state["rollouts"])
    progress.computed = sum(row["computed_tokens"] for row in progress.noted(CURVE))
    return progress


def _save(work: Work, progress: Progress, saver: Saver, wait: bool) -> None:
    """Start a save of this step; with `wait`, return when it is on disk. One due too soon comes late."""
    progress.late = work.place.any(saver.busy()) and not wait
    if progress.late:
        return
    _note_save(progress, saver, wait=True)
    if progress.saved != progress.step:
        best = {f"{BEST}{name}": placement.whole(tensor) for name, tensor in progress.best_weights.items()}
        made = checkpoint.Checkpoint(
            step=progress.step,
            tensors={name: tensor.cpu() for name, tensor in best.items()},
            state={**progress.state(), "identity": work.identity, **_sampled(work)},
            journals={name: bytes(lines) for name, lines in progress.journals.items()},
        )
        live = loop.moving(work.model, work.adam).items()
        whole = {name: placement.whole(tensor) for name, tensor in live}  # a common act, of every rank
        if work.place.leads:
            saver.begin(made, whole)
        progress.saved = progress.step
    if wait:
        _note_save(progress, saver, wait=True)


def _sampled(work: Work) -> dict[str, Any]:
    """What later steps learn from and cannot draw again, as the weights have moved on."""
    return {"rollouts": work.rollouts.state()} if work.rollouts else {}


def _note_save(progress: Progress, saver: Saver, wait: bool) -> None:
    """Take note of a save that has ended; if it failed, this is where its error comes up."""
    if saved := saver.ended(wait):
        times = {"stall_s": round(saved.stall_s, 5), "seconds": round(saved.seconds, 4)}
        progress.note(SAVES, {"step": saved.step, **times})


def _look(work: Work, progress: Progress) -> bool:
    """Held-out loss, where it is due and not yet known; false if someone asked to stop meanwhile."""
    step = progress.step
    due = step in work.looks
    if not work.held_out or not due or progress.looked >= step:
        return True
    began = time.monotonic()
    heap.trim()  # a look and a step touch other pages of the heap; neither need hold the other's
    try:
        told = work.rollouts.look() if work.rollouts else _seen(work)
    except loop.Asked:
        return False
    loss = told["loss"]
    if not math.isfinite(loss):
        raise TrainError(f"the held-out loss after step {step} is {loss}", hint="lower `lr`, raise `warmup`")
    progress.note(VALIDATION, {"step": step, **told})
    progress.looked, progress.look_s = step, time.monotonic() - began
    if progress.best_loss is None or loss < progress.best_loss:
        moving = loop.trained(work.model).items()
        weights = {f"weight:{name}": weight.detach().clone() for name, weight in moving}
        progress.best, progress.best_loss, progress.misses, progress.best_weights = step, loss, 0, weights
    else:
        progress.misses += 1
    heap.trim()
    facts = {f"validation_{name}": value for name, value in told.items()}
    work.tell(Event("train", f"held-out loss {loss:.4f}", step, work.settings.steps, facts))
    return True


def _seen(work: Work) -> dict[str, float]:
    """What the loss says of held-out rows."""
    seen = loop.look(work.model, work.held_out, work.objective, work.settings)
    return {"loss": seen.loss, "accuracy": seen.accuracy, **seen.means(work.settings.metrics)}


def _keep(work: Work, progress: Progress) -> None:
    """Bring the weights of a step that is to be kept to disk, before a checkpoint can speak of them."""
    step = progress.step
    if step not in work.kept or step in (known for known, _ in progress.kept):
        return
    moving = loop.trained(work.model).items()
    whole = {f"weight:{name}": placement.whole(weight.detach()).cpu() for name, weight in moving}
    progress.kept.append((step, _kept.write(work.folder / KEPT, step, whole) if work.place.leads else ""))
    while len(progress.kept) > work.phase.keep.last:
        dropped, _ = progress.kept.pop(0)
        if work.place.leads:
            _kept.drop(work.folder / KEPT, dropped)
    work.tell(
        Event("train", f"kept the adapter of step {step}", step, work.settings.steps, {"kept_step": step})
    )


def _given_up(work: Work, progress: Progress) -> bool:
    return progress.misses >= int(work.phase.validation.patience)


def _record(work: Work, progress: Progress, step: loop.Step) -> None:
    names = ("step", "loss", "lr", "grad_norm", "tokens", "computed_tokens", "loss_tokens", "accuracy")
    rss = memory.rss_bytes()
    progress.step = step.step
    progress.note(TIMINGS, {"step": step.step, "seconds": round(step.seconds, 4), "rss_bytes": rss})
    if step.sick is not None:
        _record_sick(work, progress, step, step.sick)
        return
    progress.in_a_row, progress.computed = 0, progress.computed + step.computed_tokens
    also, rows = dict(step.metrics), list(step.rows)
    if work.rollouts:
        also, rows = also | work.rollouts.facts, work.rollouts.rows_of(step.step)
    progress.note(CURVE, {name: getattr(step, name) for name in names} | also)
    progress.note(LEDGER, {"step": step.step, "rows": rows})
    facts = {
        "loss": step.loss, "accuracy": step.accuracy, **also, "lr": step.lr, "rss_gb": rss / 1e9,
        "tokens_per_s": step.tokens / step.seconds, "eta_s": _left_s(work, progress),
    }  # fmt: skip
    work.tell(Event("train", "training", step.step, work.settings.steps, facts))


def _left_s(work: Work, progress: Progress) -> float:
    """The tokens that are left at the pace of the last steps, and the looks at held-out loss."""
    rows, timings = (progress.last(name, pace.WINDOW + 1) for name in (CURVE, TIMINGS))
    seconds = {row["step"]: row["seconds"] for row in timings}
    timed = [(row["computed_tokens"], seconds[row["step"]]) for row in rows if row["step"] in seconds]
    looks = len(work.looks) - bisect_right(work.looks, progress.step) if work.held_out else 0
    return pace.left_s(timed, max(0, work.tokens - progress.computed)) + looks * progress.look_s


def _record_sick(work: Work, progress: Progress, step: loop.Step, sick: str) -> None:
    """A step that was skipped: its rows and the reason are kept, and too many in a row end the training."""
    progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
    progress.note(LEDGER, {"step": step.step, "rows": list(step.rows), "skipped": sick})
    said = f"skipped: {sick}; rows {', '.join(step.rows)}"
    work.tell(Event("train", said, step.step, work.settings.steps, {"skipped": progress.skipped}))
    if progress.in_a_row == IN_A_ROW or progress.skipped == work.settings.steps:
        raise loop.Sick(
            f"{progress.in_a_row} steps in a row were skipped; the last: {sick}",
            where=f"rows {', '.join(step.rows)}",
            hint="so many are not the rows' fault: lower `lr`, raise `warmup`, or raise `spike`",
        )
