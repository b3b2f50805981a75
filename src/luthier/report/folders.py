"""What the report is made from: the sealed folders of one run, read once into plain values.

File names are those that each stage documents. A folder that is absent is a stage that was not reached;
a file that cannot be read is named in `problems` and shown on the page. It knows no HTML.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.artifacts import read_json, read_jsonl
from luthier.errors import StoreError

Record = Mapping[str, Any]


@dataclass(frozen=True)
class ReportInput:
    """One run in plain values. A field is empty when its stage was not reached.

    run:        run_id, name, status, started_at, finished_at, error, stages; `recipe` and `host` too.
    reached:    the stages that left a folder.
    problems:   files that were there but could not be read.
    """

    run: Record
    reached: frozenset[str]
    card: Record
    base: Record
    plan: Record
    prediction: Record
    curve: tuple[Record, ...]
    validation: tuple[Record, ...]
    machine: Record
    scorecard: Record
    samples: tuple[Record, ...]
    efficiency: Record
    release: Record
    monitor: Record
    problems: tuple[str, ...] = ()

    def facts(self, stage: str) -> Record:
        return mapping(self.stage(stage).get("facts"))

    def stage(self, name: str) -> Record:
        """The run's record of a stage, empty if it has none."""
        return next((entry for entry in records(self.run.get("stages")) if entry.get("stage") == name), {})


def mapping(value: object) -> Record:
    return value if isinstance(value, Mapping) else {}


def records(value: object) -> list[Record]:
    """The mappings in a list; what is not of that form was not written by a stage, and is left out."""
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list | tuple) else []


def gather(folders: Mapping[str, Path], run: Record) -> ReportInput:
    """Read the stage folders that exist; never raise over one that is missing or damaged."""
    problems: list[str] = []

    def read(stage: str, name: str, reader: Callable[[Path], Any]) -> Any:
        if stage not in folders or not (path := Path(folders[stage]) / name).is_file():
            return None
        try:
            return reader(path)
        except StoreError as error:
            problems.append(f"{stage}/{name}: {error.what}")
            return None

    def one(stage: str, name: str) -> Record:
        return mapping(read(stage, name, read_json))

    def many(stage: str, name: str) -> tuple[Record, ...]:
        return tuple(row for row in read(stage, name, read_jsonl) or () if isinstance(row, Mapping))

    return ReportInput(
        run=run,
        reached=frozenset(stage for stage, folder in folders.items() if Path(folder).is_dir()),
        card=one("data", "card.json"),
        base=one("model", "base.json"),
        plan=one("plan", "plan.json"),
        prediction=one("plan", "observed/prediction.json"),
        curve=many("train", "curve.jsonl"),
        validation=many("train", "validation.jsonl"),
        machine=one("train", "observed/host.json"),
        scorecard=one("evaluate", "scorecard.json"),
        samples=many("evaluate", "samples.jsonl"),
        efficiency=one("evaluate", "observed/efficiency.json"),
        release=one("release", "release.json"),
        monitor=one("monitor", "observed/report.json"),
        problems=tuple(problems),
    )
