"""The seven stages, in order. Each is `run(section, inputs, out) -> facts`: paths in, a folder out.

A stage reads sealed artefacts of earlier stages, writes files into `out`, returns facts (JSON values)
and knows no store, no run and no other stage; `pipeline` hashes, reuses, records and audits around it.
What depends on the clock or the host (seconds, memory, latencies) goes below `out/observed/`, which is
kept and verified but is not part of an artefact's digest.

What the pipeline must know of a stage before it runs stands in `STAGES`, so that a stage which is reused is
not even imported (torch and transformers take seconds).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Declared:
    """What a stage is to the pipeline.

    version:        raised when the stage would make something else of the same input.
    needs:          the stages whose artefacts it reads.
    external:       it offers `external(section, root) -> {name: digest}`, content it reads outside the store.
    named:          the recipe's name is part of what it makes.
    wants_champion: it is also handed the release in production.
    saves_on_stop:  asked to stop, it saves its work first; others are interrupted at once.
    """

    version: int
    needs: tuple[str, ...] = ()
    external: bool = False
    named: bool = False
    wants_champion: bool = False
    saves_on_stop: bool = False


STAGES = {
    "data": Declared(version=1, external=True),
    "model": Declared(version=2, needs=("data",), external=True),
    "plan": Declared(version=4, needs=("data", "model")),
    "train": Declared(version=5, needs=("data", "model", "plan"), saves_on_stop=True),
    "evaluate": Declared(version=4, needs=("data", "model", "plan", "train")),
    "release": Declared(
        version=2, needs=("data", "model", "plan", "train", "evaluate"), named=True, wants_champion=True
    ),
    "monitor": Declared(version=1, needs=("evaluate",), named=True),
}
ORDER = tuple(STAGES)


@dataclass(frozen=True)
class Event:
    """Something worth showing while a stage works. `done`/`total` count `unit`s when progress is known."""

    stage: str
    message: str
    done: int | None = None
    total: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def _silent(event: Event) -> None:
    del event


@dataclass(frozen=True)
class Inputs:
    """What a stage is handed.

    name:      the recipe's name, which is the model's name.
    artefacts: sealed folder of each stage this one `needs`, and `champion` (what is in production) if any.
    digests:   the content digest of each of those artefacts, by the same names.
    root:      the recipe's folder; relative paths in the recipe start here.
    cache:     downloads and conversions, addressed by digest; deleting it costs time, never truth.
    scratch:   outlives a crash of this very stage (checkpoints); removed once the stage is sealed.
    seed:      the run's seed; all randomness of a stage comes from it.
    tell:      shows progress.
    stopping:  true once someone asked the run to stop: save, then raise `errors.Interrupted`.
    """

    name: str
    artefacts: Mapping[str, Path]
    digests: Mapping[str, str]
    root: Path
    cache: Path
    scratch: Path
    seed: int
    tell: Callable[[Event], None] = _silent
    stopping: Callable[[], bool] = lambda: False

    def as_dict(self) -> dict[str, Any]:
        """All but the two callables, as JSON values: what a process of one's own is handed."""
        places = {name: str(path) for name, path in self.artefacts.items()}
        paths = {name: str(getattr(self, name)) for name in ("root", "cache", "scratch")}
        plain = {"name": self.name, "digests": dict(self.digests), "seed": self.seed}
        return {**plain, "artefacts": places, **paths}
