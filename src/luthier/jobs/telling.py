"""What a run says, as a job's events: plan, every step's metrics, held-out loss, gates; and leave to begin.

Source: the events of OpenAI's jobs (`type: metrics`, `data: {step, train_loss, train_mean_token_accuracy,
valid_loss, …}`). Each has a key, so a step that is done again after a crash is told once. After the plan and
before the training the job waits until the memory it is forecast to need is free beside those that run.
It does not know how stages work, nor how events are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from luthier.engine import memory
from luthier.errors import Interrupted
from luthier.home import Home
from luthier.jobs.queue import Queue
from luthier.jobs.records import Claim, Job, Note
from luthier.pipeline import Stop
from luthier.stages import Event

BEAT_S = 1.0
SPARE = 0.05  # of the machine's memory stays free whatever is planned
NAMES = {
    "loss": "train_loss",
    "accuracy": "train_mean_token_accuracy",
    "reward": "train_mean_reward",
    "validation_reward": "valid_mean_reward",
    "validation_loss": "valid_loss",
    "validation_accuracy": "valid_mean_token_accuracy",
}
TELLS = {
    "data": "Reading the training data",
    "model": "Preparing the base model",
    "plan": "Planning",
    "train": "Training",
    "evaluate": "Examining the model",
    "release": "Gates are looking at the model",
}


@dataclass(frozen=True)
class Telling:
    """The `tell` of one attempt at a job."""

    queue: Queue
    claim: Claim
    job: Job
    home: Home
    stop: Stop

    def tell(self, event: Event) -> None:
        if event.message == "begins":
            if event.stage in TELLS:
                self.say(Note(TELLS[event.stage], f"{event.stage}:begins"))
        elif event.message in ("done", "reused"):
            DONE.get(event.stage, _nothing)(self, event.facts)
        elif event.stage == "train":
            self._trained(event)

    def say(self, note: Note | None, **values: Any) -> None:
        """Tell it; if the job is not ours any more (paused, cancelled, taken), ask the run to stop."""
        if not self.queue.note(self.claim, note, **values):
            self.stop.requested = True

    def _trained(self, event: Event) -> None:
        step, total = event.done or 0, event.total or 0
        found = {new: event.facts[old] for old, new in NAMES.items() if old in event.facts}
        where = f"Step {step}/{total}"
        if "train_loss" in found:
            finish = int(time.time() + event.facts.get("eta_s", 0.0))
            self._step(step, total, found, estimated_finish=finish, deaths=0)
        elif "valid_loss" in found:
            said = f"{where}: validation loss={found['valid_loss']:.4f}"
            data = {"step": step, "total_steps": total, **found}
            self.say(Note(said, f"valid:{step}", type="metrics", data=data))
        elif event.message.startswith("skipped"):
            self.say(Note(f"{where}: {event.message}", f"skipped:{step}", "warn"))
        elif event.message.startswith("going on"):
            self.say(Note(f"Resumed from step {step}", f"resumed:{self.job.attempts}"))

    def _step(self, step: int, total: int, found: Mapping[str, Any], **values: Any) -> None:
        said = f"Step {step}/{total}: training loss={found['train_loss']:.4f}"
        data = {"step": step, "total_steps": total, **found}
        self.say(Note(said, f"step:{step}", type="metrics", data=data), **values)

    def planned(self, facts: Mapping[str, Any]) -> None:
        promise = {name: facts[name] for name in PROMISED if name in facts}
        said = (
            f"Plan: {facts['tokens']:,} tokens in {facts['steps']:,} steps, about {facts['minutes']:.1f} "
            f"minutes, {facts['peak_gb']:.2f} GB of memory"
        )
        said += f", price {facts['money']:.4f}" if "money" in facts else ""
        self.say(Note(said, "planned", data=promise), planned=promise)
        for warning in facts.get("warnings", ()):
            self.say(Note(warning, f"warning:{warning[:60]}", "warn"))
        self._admitted(int(1e9 * facts["peak_gb"]))
        self.say(Note("Memory is reserved; training begins", "admitted"), estimated_finish=_finish(facts))

    def _admitted(self, peak_bytes: int) -> None:
        """Wait until this peak fits beside those of the machine's other jobs; then hold it."""
        while True:
            with self.home.lock("job-admission", self._heed):
                room = self._room()
                if peak_bytes - memory.rss_bytes() <= room:
                    self.say(None, peak_bytes=peak_bytes)
                    return
            words = (
                f"Waiting for memory: {peak_bytes / 1e9:.2f} GB are needed, {max(0, room) / 1e9:.2f} GB free"
            )
            self.say(Note(words, f"waits:{self.job.attempts}"))
            self._heed("")
            time.sleep(BEAT_S)

    def _room(self) -> int:
        """What is free, less what other jobs were promised and have not taken yet."""
        total, free = memory.machine()
        others = (job for job in self.queue.running(self.claim.host) if job.id != self.job.id)
        owed = sum(max(0, (job.peak_bytes or 0) - (job.held_bytes or 0)) for job in others)
        return int(free - owed - SPARE * total)

    def _heed(self, pid: str) -> None:
        if self.stop.requested:
            raise Interrupted("stopped while waiting for memory")

    def read(self, facts: Mapping[str, Any]) -> None:
        if left_out := facts["leaks_removed"].get("train"):
            said = f"{left_out} training examples are left out: their prompt stands in the validation file"
            self.say(Note(said, "leaks", "warn"))

    def examined(self, facts: Mapping[str, Any]) -> None:
        losses = facts.get("loss") or {}
        if {"base", "tuned"} <= set(losses):
            said = f"Examined on {facts['rows']} rows: loss {losses['base']:.4f} → {losses['tuned']:.4f}"
            self.say(Note(said, "examined", data={"loss": losses, "rows": facts["rows"]}))

    def caught_up(self, curve: Iterable[Mapping[str, Any]], total: int) -> None:
        """Tell the steps that a holder trained and saved but could not tell any more."""
        told = self.queue.keys(self.job.id)
        for row in curve:
            if f"step:{row['step']}" in told:
                continue
            found = {new: row[old] for old, new in NAMES.items() if old in row}
            self._step(row["step"], total, found)

    def learnt(self, facts: Mapping[str, Any]) -> None:
        said = f"Training is done after {facts['steps']:,} steps and {facts['useful_tokens']:,} tokens"
        kept = {name: facts[name] for name in ("steps", "useful_tokens", "best_step", "validation_loss")}
        self.say(Note(said, "trained", data=kept))
        if facts["best_step"] == 0:
            said = "No step was better on the validation file than the base itself; its weights are kept"
            self.say(Note(said, "untrained", "warn"))

    def judged(self, facts: Mapping[str, Any]) -> None:
        for verdict in facts["verdicts"]:
            passed = bool(verdict["passed"])
            word, level = ("passed", "info") if passed else ("refused", "error")
            data = {"gate": verdict["gate"], "passed": passed, "reason": verdict["reason"]}
            said = f"Gate {verdict['gate']} {word}: {verdict['reason']}"
            self.say(Note(said, f"gate:{verdict['gate']}", level, data=data))


PROMISED = ("tokens", "steps", "minutes", "peak_gb", "money", "energy_kwh")
DONE: dict[str, Callable[[Telling, Mapping[str, Any]], None]] = {
    "data": Telling.read,
    "plan": Telling.planned,
    "train": Telling.learnt,
    "evaluate": Telling.examined,
    "release": Telling.judged,
}


def _nothing(telling: Telling, facts: Mapping[str, Any]) -> None:
    del telling, facts


def _finish(facts: Mapping[str, Any]) -> int:
    return int(time.time() + 60 * facts["minutes"])
