"""Stage 4, train: the plan is carried out, and a crash at any moment costs minutes, never the result.

The `for` below is all there is around `engine.loop`: it keeps the curve and the ledger of rows, looks at
held-out loss (at step 0, every few steps and at the end), keeps the best adapter, saves checkpoints in
`scratch`, stops early or when asked. Killed and started again, it leaves the bytes that an uninterrupted run
leaves: what follows a checkpoint depends on the checkpoint alone.

The adapter it leaves is the one with the best held-out loss (the last one where there are no validation
rows). It does not know what the loss is, which weights move, or how good the answers are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier import artifacts, template
from luthier.engine import base as bases
from luthier.engine import batch, checkpoint, loop, memory
from luthier.errors import Interrupted, TrainError
from luthier.objectives import Batch
from luthier.rows import chat
from luthier.stages import Event, Inputs
from luthier.template import Encoded

VERSION = 1
NEEDS = ("data", "model", "plan")
SAVES_ON_STOP = True

CURVE, VALIDATION, LEDGER, TIMINGS = "curve.jsonl", "validation.jsonl", "ledger.jsonl", "timings.jsonl"
JOURNALS = (CURVE, VALIDATION, LEDGER, TIMINGS)
EDGE = 5  # `loss_first` and `loss_last` are means over this many steps


@dataclass(frozen=True)
class Work:
    """All that stays the same while training."""

    model: Any
    adam: torch.optim.AdamW
    loader: batch.Loader
    held_out: tuple[Batch, ...]
    objective: loop.Objective
    settings: loop.Settings
    phase: Any
    folder: Path
    identity: str
    stopping: Callable[[], bool]
    tell: Callable[[Event], None]


@dataclass
class Progress:
    """All that changes, beside weights and moments. A checkpoint holds exactly this."""

    step: int = 0
    looked: int = -1
    best: int | None = None
    best_loss: float | None = None
    misses: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    saved: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        names = ("looked", "best", "best_loss", "misses", "seconds", "peak_rss_bytes")
        return {name: getattr(self, name) for name in names}


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    plan = artifacts.read_json(inputs.artefacts["plan"] / "plan.json")
    torch.set_num_threads(plan["threads"])
    memory.release()
    memory.forget_peak()
    work = _prepare(section[0], plan, inputs)
    progress = _resume(work)
    began = time.monotonic() - progress.seconds

    def pause() -> None:
        """Between two steps: look at held-out loss, save, and leave if asked to."""
        progress.seconds = time.monotonic() - began
        progress.peak_rss_bytes = max(progress.peak_rss_bytes, memory.peak_rss_bytes())
        looked = _look(work, progress)
        ended = looked and (progress.step == work.settings.steps or _given_up(work, progress))
        asked = not ended and work.stopping()
        if asked or ended or progress.step % work.phase.checkpoint_every == 0:
            _save(work, progress)
        if asked:
            raise Interrupted(
                f"training stopped at step {progress.step} of {work.settings.steps}; everything is saved",
                hint="run the same command again: it goes on from here",
            )

    pause()
    if not _given_up(work, progress):
        for step in loop.train(
            work.model, work.loader, work.objective, work.adam, work.settings, start=progress.step
        ):
            _record(work, progress, step, time.monotonic() - began)
            pause()
            if _given_up(work, progress):
                break
    progress.seconds = time.monotonic() - began
    if progress.best_weights:
        loop.put_weights(work.model, progress.best_weights)
    return _leave(work, progress, plan, inputs, out)


def _prepare(phase: Any, plan: Any, inputs: Inputs) -> Work:
    objective, method = phase.objective, phase.method
    if objective.module.NEEDS:
        raise TrainError(f"{objective.name} needs {', '.join(sorted(objective.module.NEEDS))}", where="train")
    inputs.tell(Event("train", "loading the base model", 0, plan["steps"]))
    base = inputs.artefacts["model"] / "base"
    tokenizer = template.load_tokenizer(base)
    rows, held_out = (artifacts.read_jsonl(_rows(inputs, split)) for split in ("train", "validation"))
    ids = tuple(record["id"] for record in rows)
    needed = batch.Loader.needed(ids, phase.batch, inputs.seed, plan["steps"])
    looked = batch.order(tuple(record["id"] for record in held_out), inputs.seed, "validation")
    looked = looked[: phase.validation.rows]
    encoded = _encode(tokenizer, [rows[row] for row in needed])
    model = method.module.attach(bases.load(base, plan["dtype"]), method.params, inputs.seed)
    settings = loop.Settings(
        steps=plan["steps"], lr=phase.lr, seed=inputs.seed, warmup=phase.warmup, schedule=phase.schedule,
        weight_decay=phase.weight_decay, clip=phase.clip,
    )  # fmt: skip
    micro_tokens = plan["micro_tokens"]
    return Work(
        model=model,
        adam=loop.optimiser(model, settings),
        loader=batch.Loader(
            ids, dict(zip(needed, encoded, strict=True)), phase.batch, micro_tokens, inputs.seed
        ),
        held_out=batch.micro_batches(_encode(tokenizer, [held_out[row] for row in looked]), micro_tokens),
        objective=lambda policy, reference, micro: objective.module.loss(
            policy, reference, micro, objective.params
        ),
        settings=settings,
        phase=phase,
        folder=inputs.scratch / "checkpoints",
        identity=artifacts.digest_of(
            {"inputs": dict(inputs.digests), "seed": inputs.seed, "phase": phase.model_dump(mode="json")}
        ),
        stopping=inputs.stopping,
        tell=inputs.tell,
    )


def _rows(inputs: Inputs, split: str) -> Path:
    return inputs.artefacts["data"] / "rows" / f"{split}.jsonl"


def _encode(tokenizer: Any, records: Sequence[Any]) -> list[Encoded]:
    return template.encode_all(tokenizer, [chat(record["messages"], record["where"]) for record in records])


def _resume(work: Work) -> Progress:
    """Go on from the newest checkpoint that is whole; say which were not. Without one, begin afresh."""
    work.folder.mkdir(parents=True, exist_ok=True)
    found, skipped = checkpoint.newest(work.folder, work.identity)
    for line in skipped:
        work.tell(Event("train", line, 0, work.settings.steps))
    if found is None:
        for name in JOURNALS:
            (work.folder / name).unlink(missing_ok=True)
        return Progress()
    loop.restore(work.model, work.adam, found.tensors, found.step)
    known = {name: found.state[name] for name in Progress().state()}
    work.tell(Event("train", f"going on after step {found.step}", found.step, work.settings.steps))
    return Progress(**known, step=found.step, saved=found.step, best_weights=found.best or {})


def _save(work: Work, progress: Progress) -> None:
    if progress.saved == progress.step:
        return
    journals = {name: checkpoint.mark(work.folder / name) for name in JOURNALS}
    state = {**progress.state(), "identity": work.identity, "journals": journals}
    checkpoint.save(work.folder, progress.step, loop.snapshot(work.model, work.adam), state)
    progress.saved = progress.step


def _look(work: Work, progress: Progress) -> bool:
    """Held-out loss, where it is due and not yet known; false if someone asked to stop meanwhile."""
    step = progress.step
    due = step % work.phase.validation.every == 0 or step == work.settings.steps
    if not work.held_out or not due or progress.looked >= step:
        return True
    total, count = 0.0, 0
    for total, count in loop.mean_loss(work.model, work.held_out, work.objective):  # noqa: B007
        if work.stopping():
            return False
    loss = total / count
    checkpoint.append(work.folder / VALIDATION, [{"step": step, "loss": loss}])
    progress.looked = step
    if progress.best_loss is None or loss < progress.best_loss:
        moving = loop.trained(work.model).items()
        weights = {f"weight:{name}": weight.detach().clone() for name, weight in moving}
        checkpoint.save_best(work.folder, step, weights)
        progress.best, progress.best_loss, progress.misses, progress.best_weights = step, loss, 0, weights
    else:
        progress.misses += 1
    work.tell(
        Event("train", f"held-out loss {loss:.4f}", step, work.settings.steps, {"validation_loss": loss})
    )
    return True


def _given_up(work: Work, progress: Progress) -> bool:
    return progress.misses >= int(work.phase.validation.patience)


def _record(work: Work, progress: Progress, step: loop.Step, seconds: float) -> None:
    names = ("step", "loss", "lr", "grad_norm", "tokens", "loss_tokens")
    rss = memory.rss_bytes()
    checkpoint.append(work.folder / CURVE, [{name: getattr(step, name) for name in names}])
    checkpoint.append(work.folder / LEDGER, [{"step": step.step, "rows": list(step.rows)}])
    checkpoint.append(
        work.folder / TIMINGS, [{"step": step.step, "seconds": round(step.seconds, 4), "rss_bytes": rss}]
    )
    progress.step = step.step
    facts = {
        "loss": step.loss, "lr": step.lr, "tokens_per_s": step.tokens / step.seconds, "rss_gb": rss / 1e9,
        "eta_s": seconds / step.step * (work.settings.steps - step.step),
    }  # fmt: skip
    work.tell(Event("train", "training", step.step, work.settings.steps, facts))


def _leave(work: Work, progress: Progress, plan: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Write the artefact: adapter, records and facts."""
    about = artifacts.read_json(inputs.artefacts["model"] / "base.json")
    method = work.phase.method.module
    method.save(work.model, out / "adapter", f"luthier-base:{about['digest'][:12]}")
    (out / "observed").mkdir(exist_ok=True)
    for name in JOURNALS:
        path = work.folder / name
        place = out / "observed" / name if name == TIMINGS else out / name
        artifacts.write_bytes(place, path.read_bytes() if path.exists() else b"")
    curve, timings = artifacts.read_jsonl(out / CURVE), artifacts.read_jsonl(out / "observed" / TIMINGS)
    kept = progress.best if progress.best is not None else progress.step
    outcome = {
        "steps": progress.step,
        "stopped_early": progress.step < work.settings.steps,
        "best_step": kept,
        "validation_loss": progress.best_loss,
        "loss_first": _mean([row["loss"] for row in curve[:EDGE]]),
        "loss_last": _mean([row["loss"] for row in curve[-EDGE:]]),
        "useful_tokens": sum(row["tokens"] for row in curve),
        "loss_tokens": sum(row["loss_tokens"] for row in curve),
        **method.report(work.model),
    }
    phase = work.phase.model_dump(mode="json")
    asked = {"seed": inputs.seed, "phase": phase, "base": about["digest"]}
    artifacts.write_json(out / "phase.json", outcome | asked)
    step_seconds = sum(row["seconds"] for row in timings)
    observed = {
        "train_seconds": round(progress.seconds, 2),
        "step_seconds": round(step_seconds, 2),
        "tokens_per_s": round(outcome["useful_tokens"] / step_seconds, 1) if step_seconds else 0.0,
        "peak_rss_bytes": progress.peak_rss_bytes,
        "peak_gb": round(progress.peak_rss_bytes / 1e9, 3),
        "minutes": round(progress.seconds / 60, 4),
    }
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": plan["threads"]}
    artifacts.write_json(out / "observed" / "host.json", machine | observed)
    return outcome | observed


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
