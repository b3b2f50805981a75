"""Runs the seven stages in order: the only code that hashes, reuses, records and audits.

A stage's key says what was asked (its section, its version, the digests of what it reads); the digest of
its sealed folder says what came out. Same key: the sealed folder is used again. Every stage works in
`work/<key>` and its folder is published by one rename, so a crash leaves either nothing or all of it.

It knows no stage's contents, no command line and no HTTP.
"""

from __future__ import annotations

import errno
import importlib
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from luthier import artifacts
from luthier.errors import GateRefused, Interrupted, LuthierError, StoreError
from luthier.home import Home
from luthier.stages import ORDER, STAGES, Event, Inputs
from luthier.store import ReleaseRecord, RequestRecord, StageRecord, Store

if TYPE_CHECKING:
    from luthier.recipe import Recipe

Tell = Callable[[Event], None]


@dataclass
class Stop:
    """A request to stop, from a signal handler: at once, or when a stage that saves its work has saved."""

    requested: bool = False
    saving: bool = False

    def request(self) -> None:
        again, self.requested = self.requested, True
        if again or not self.saving:
            raise Interrupted("stopped", hint="run the same command again: finished stages are reused")


@dataclass(frozen=True)
class Place:
    """Where a run happens: the home, its store, the recipe's folder, who watches and who may stop it."""

    home: Home
    store: Store
    root: Path
    tell: Tell = lambda event: None
    stop: Stop = field(default_factory=Stop)
    about: Mapping[str, Any] = field(default_factory=dict)  # facts that a release keeps: whose it is, why


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `stages` holds one record per stage that ran or was reused, in order."""

    run_id: str
    name: str
    status: str
    stages: tuple[StageRecord, ...]
    release: str | None
    report: Path | None

    def stage(self, name: str) -> StageRecord:
        return next(record for record in self.stages if record.stage == name)


def run(recipe: Recipe, place: Place, *, until: str = ORDER[-1]) -> Outcome:
    """Run the stages up to `until`; raise `GateRefused` after recording when a gate said no."""
    reap(place)
    with ExitStack() as held:
        with place.home.lock("runs", lambda pid: None):  # between its row and its lock nobody may reap a run
            run_id = place.store.begin_run(recipe.name, recipe.as_dict(), host())
            held.enter_context(place.home.lock(f"run-{run_id}", lambda pid: None))
        return _run(recipe, place, run_id, until)


def _run(recipe: Recipe, place: Place, run_id: str, until: str) -> Outcome:
    done: dict[str, StageRecord] = {}
    status, problem = "failed", ""
    try:
        for stage in ORDER[: ORDER.index(until) + 1]:
            done[stage] = _stage(recipe, stage, done, run_id, place)
            if stage == "release":
                _register(recipe, done, run_id, place)
        status = "done"
    except GateRefused as refusal:
        status, problem = "refused", str(refusal)
        raise
    except (Interrupted, KeyboardInterrupt) as interruption:
        status, problem = "interrupted", str(interruption) or "stopped"
        raise
    except LuthierError as error:
        problem = str(error)
        raise
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise _as_ours(error) from error
    finally:
        release = done["release"].digest if status == "done" and "release" in done else None
        place.store.end_run(run_id, status, release=release, error=problem or None)
        path = _report(recipe, run_id, done, place)
    return Outcome(run_id, recipe.name, status, tuple(done.values()), release, path)


def reap(place: Place) -> None:
    """Give runs whose process died without a word (kill -9, power) the status they have: interrupted."""
    with place.home.lock("runs", lambda pid: None):
        for record in place.store.runs(limit=200):
            if record.status == "running" and not place.home.is_locked(f"run-{record.id}"):
                place.store.end_run(record.id, "interrupted", error="the process ended without a word")


def host() -> dict[str, Any]:
    """What this run runs on, for the record."""
    from importlib import metadata

    packages = ("luthier", "torch", "transformers", "peft", "safetensors", "tokenizers")
    versions = {name: _version(metadata, name) for name in packages}
    return {
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def _version(metadata: ModuleType, name: str) -> str:
    try:
        return str(metadata.version(name))
    except metadata.PackageNotFoundError:
        return "absent"


def _stage(
    recipe: Recipe, stage: str, done: Mapping[str, StageRecord], run_id: str, place: Place
) -> StageRecord:
    """Reuse the stage if its key is known and its folder is whole; else build it under the key's lock."""
    digests = {need: done[need].digest for need in STAGES[stage].needs}
    if STAGES[stage].wants_champion:
        digests |= _champion(recipe, done["train"].digest, place.store)
    key = _key(recipe, stage, digests, place.root)

    def waiting(pid: str) -> None:
        place.tell(Event(stage, f"another run (pid {pid}) is building this stage; waiting"))
        if place.stop.requested:
            raise Interrupted("stopped while waiting for another run")

    with place.home.lock(key, waiting):
        record = _reuse(key, place)
        if record is None:
            # What was observed is handed over but never keyed: a log says how it went, not what was asked.
            observed = (
                {"requests": place.home.artifact(done["release"].digest) / "observed"}
                if stage == "monitor"
                else {}
            )
            record = _build(recipe, stage, key, digests, observed, place)
        place.store.record_stage(run_id, record)
        shutil.rmtree(place.home.work / key, ignore_errors=True)
    place.tell(Event(stage, "reused" if record.reused else "done", 1, 1, record.facts))
    return record


def _key(recipe: Recipe, stage: str, digests: Mapping[str, str], root: Path) -> str:
    versions = {stage: STAGES[stage].version}
    versions |= {f"{part.family}/{part.name}": part.version for part in recipe.parts(stage)}
    inputs = dict(digests)
    if STAGES[stage].external:
        found = _module(stage).external(recipe.section(stage), root)
        inputs |= {f"external:{name}": digest for name, digest in found.items()}
    if STAGES[stage].named:
        inputs["name"] = recipe.name
    return artifacts.stage_key(stage, recipe.asked(stage), versions, inputs, recipe.seed)


def _module(stage: str) -> Any:
    """Imported when it is needed: plan, train and evaluate load torch, which takes seconds."""
    return importlib.import_module(f"luthier.stages.{stage}")


def _reuse(key: str, place: Place) -> StageRecord | None:
    known = place.store.find_stage(key)
    if known is None:
        return None
    try:
        if artifacts.verify(place.home.artifact(known.digest), deep=False) != known.digest:
            raise StoreError(
                "another folder lies under this digest", where=str(place.home.artifact(known.digest))
            )
    except StoreError as damage:
        place.tell(Event(known.stage, f"the sealed folder is damaged, building it again: {damage.what}"))
        place.store.forget_stage(key)
        quarantine = place.home.work / f"damaged-{known.digest[:12]}-{time.time_ns()}"
        if place.home.artifact(known.digest).exists():
            place.home.artifact(known.digest).rename(quarantine)
        return None
    return StageRecord(known.stage, key, known.digest, True, 0.0, known.facts)


def _build(
    recipe: Recipe,
    stage: str,
    key: str,
    digests: Mapping[str, str],
    observed: Mapping[str, Path],
    place: Place,
) -> StageRecord:
    began = time.monotonic()
    out, scratch = place.home.work / key / "out", place.home.work / key / "scratch"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    artefacts = {name: place.home.artifact(digest) for name, digest in digests.items()}
    inputs = Inputs(
        name=recipe.name,
        artefacts=artefacts | dict(observed),
        digests=digests,
        root=place.root,
        cache=place.home.cache,
        scratch=scratch,
        seed=recipe.seed,
        tell=place.tell,
        stopping=lambda: place.stop.requested,
    )
    place.tell(Event(stage, "begins"))
    with _saving(place.stop, STAGES[stage].saves_on_stop):
        facts = _module(stage).run(recipe.section(stage), inputs, out)
    artifacts.write_json(out / "observed" / "facts.json", facts)
    digest = artifacts.seal(out)
    artifacts.publish(out, place.home.artifact(digest))
    return StageRecord(stage, key, digest, False, round(time.monotonic() - began, 3), facts)


@contextmanager
def _saving(stop: Stop, saves: bool) -> Iterator[None]:
    stop.saving = saves
    try:
        yield
    finally:
        stop.saving = False
    if stop.requested:
        raise Interrupted("stopped", hint="run the same command again: finished stages are reused")


def _champion(recipe: Recipe, adapter: str, store: Store) -> dict[str, str]:
    """The release to beat. One with this very adapter is no rival: then the one it was judged against is."""
    digest = store.resolve(recipe.name, recipe.release.champion)
    while digest is not None:
        facts = store.release(recipe.name, digest).facts
        if facts["train"] != adapter:
            return {"champion": digest}
        digest = facts.get("champion")
    return {}


def _register(recipe: Recipe, done: Mapping[str, StageRecord], run_id: str, place: Place) -> None:
    """Enter the release, move its first alias if every gate passed, and say no otherwise."""
    record = done["release"]
    facts = {stage: done[stage].digest for stage in ("data", "model", "plan", "train", "evaluate")}
    champion = record.facts.get("champion")
    accepted = bool(record.facts["accepted"])
    place.store.add_release(
        ReleaseRecord(
            record.digest, recipe.name, run_id, accepted, {**place.about, **facts, "champion": champion}
        )
    )
    if not accepted:
        reasons = "; ".join(
            f"{verdict['gate']}: {verdict['reason']}"
            for verdict in record.facts["verdicts"]
            if not verdict["passed"]
        )
        raise GateRefused(
            f"{recipe.name} is not released: {reasons}",
            where=run_id,
            hint=f"look at the evidence: luthier show {run_id}",
        )
    current = place.store.resolve(recipe.name, recipe.release.alias)
    if current != record.digest:
        place.store.move_ref(
            recipe.name,
            recipe.release.alias,
            record.digest,
            expected=current,
            actor=f"pipeline:{run_id}",
            reason="all gates passed",
        )


def _report(recipe: Recipe, run_id: str, done: Mapping[str, StageRecord], place: Place) -> Path | None:
    """Leave `runs/<run id>/report.html` whatever became of the run, once a first stage is done."""
    if not done:
        return None
    from luthier import report  # here, so that verbs which draw nothing do not wait for it

    folder = place.home.runs / run_id
    folder.mkdir(parents=True, exist_ok=True)
    record = place.store.run(run_id)
    facts = {
        "run_id": run_id,
        "name": recipe.name,
        "status": record.status,
        "started_at": record.started_at,
        "finished_at": record.ended_at,
        "error": record.error,
        "host": record.host,
        "recipe": recipe.as_dict(),
        "stages": [vars_of(stage) for stage in done.values()],
    }
    folders = {stage: place.home.artifact(entry.digest) for stage, entry in done.items()}
    artifacts.write_json(folder / "recipe.json", recipe.as_dict())
    page = report.render(report.gather(folders, facts))
    artifacts.write_bytes(folder / "report.html", page.encode("utf-8"))
    return folder / "report.html"


def vars_of(record: StageRecord) -> dict[str, Any]:
    """A stage record as plain values, the form that reports and `--json` speak."""
    return {
        "stage": record.stage,
        "key": record.key,
        "digest": record.digest,
        "reused": record.reused,
        "seconds": record.seconds,
        "facts": dict(record.facts),
    }


def _as_ours(error: Exception) -> Exception:
    """A full or failing disk shows up as many kinds of error; give it the one name people can act on."""
    number = getattr(error, "errno", None)
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        return StoreError(
            "the disk is full", where=text, hint="free some space and run the same command again"
        )
    if number in (errno.EIO, errno.EROFS):
        return StoreError(
            "the disk failed", where=text, hint="check the disk; nothing that was sealed is lost"
        )
    return error


def watch(
    recipe: Recipe, release: ReleaseRecord, requests: list[RequestRecord], place: Place
) -> dict[str, Any]:
    """Stage 7 on live traffic: the stage of a run, reading the request log instead of the rehearsal."""
    with tempfile.TemporaryDirectory(dir=place.home.work) as folder:
        log, out, scratch = (Path(folder) / name for name in ("log", "out", "scratch"))
        for path in (log, out, scratch):
            path.mkdir()
        artifacts.write_jsonl(log / "requests.jsonl", [asdict(request) for request in requests])
        digests = {"evaluate": release.facts["evaluate"]}
        artefacts = {"evaluate": place.home.artifact(digests["evaluate"]), "requests": log}
        inputs = Inputs(recipe.name, artefacts, digests, place.root, place.home.cache, scratch, recipe.seed)
        _module("monitor").run(recipe.monitor, inputs, out)
        verdict: dict[str, Any] = artifacts.read_json(out / "observed" / "report.json")
    place.store.record_event("monitor", {"release": release.digest, "report": verdict})
    return verdict | {"release": release.digest, "name": recipe.name}
