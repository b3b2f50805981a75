"""The seven stages, in order. Each is `run(section, inputs, out) -> facts`: paths in, a folder out.

A stage reads sealed artefacts of earlier stages, writes files into `out`, returns facts (JSON values)
and knows no store, no run and no other stage; `pipeline` hashes, reuses, records and audits around it.
What depends on the clock or the host (seconds, memory, latencies) goes below `out/observed/`, which is
kept and verified but is not part of an artefact's digest.

A stage module declares `VERSION`, `NEEDS` (names of the stages it reads), `run`, and may declare
`external(section, root) -> {name: digest}` for content outside the store that it depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ORDER = ("data", "model", "plan", "train", "evaluate", "release", "monitor")


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
    artefacts: sealed folder of each stage in `NEEDS`, and `champion` (the release in production) if any.
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
