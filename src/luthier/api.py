"""Every verb of luthier as a function; the doors (command line, HTTP) call only this.

Functions take plain values and return plain values or frozen records; they print nothing. Each takes
`home` (default `$LUTHIER_HOME`, else `~/.luthier`). It knows no terminal, no socket and no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier import artifacts, pipeline
from luthier.errors import LuthierError, NotFound, RecipeError, StoreError
from luthier.home import Home
from luthier.pipeline import Outcome, Place, Stop, Tell
from luthier.schema.core import ALIAS
from luthier.store import ReleaseRecord, Store

if TYPE_CHECKING:  # `promote` and `rollback` should not wait for what only runs need
    from luthier.recipe import Recipe

Homeish = str | Path | None


def _quiet(event: object) -> None:
    del event


def run(
    recipe: str | Path | Recipe,
    *,
    set: Sequence[str] = (),
    home: Homeish = None,
    until: str = "monitor",
    tell: Tell = _quiet,
    stop: Stop | None = None,
) -> Outcome:
    """Take a recipe through its stages. Finished stages with the same key are reused.

    set:   overrides such as `"train.0.lr=1e-4"`.
    tell:  called with an `Event` for everything worth showing (`tell=print` works).
    Raises a `LuthierError`; `GateRefused` when the model was trained but not released.
    """
    from luthier import recipe_file
    from luthier.recipe import Recipe

    root = Path.cwd() if isinstance(recipe, Recipe) else Path(recipe).absolute().parent
    if isinstance(recipe, Recipe) and set:
        raise RecipeError(
            "`set` changes a recipe file; a Recipe is already resolved", hint="use recipe.model_copy"
        )
    resolved = recipe if isinstance(recipe, Recipe) else recipe_file.load(Path(recipe), set)
    place = _place(home)
    return pipeline.run(resolved, Place(place.home, place.store, root, tell, stop or Stop()), until=until)


def plan(
    recipe: str | Path | Recipe, *, set: Sequence[str] = (), home: Homeish = None, tell: Tell = _quiet
) -> Outcome:
    """Stages 1 to 3 only: what the run would train, its memory and its minutes, before spending them."""
    return run(recipe, set=set, home=home, until="plan", tell=tell)


def runs(*, home: Homeish = None, limit: int = 50) -> list[dict[str, Any]]:
    """Runs, newest first."""
    place = _place(home)
    pipeline.reap(place)
    return [
        {
            "run": record.id,
            "name": record.name,
            "status": record.status,
            "started_at": record.started_at,
            "finished_at": record.ended_at,
            "release": record.release,
        }
        for record in place.store.runs(limit=limit)
    ]


def show(run: str, *, home: Homeish = None) -> dict[str, Any]:
    """One run, whole: status, stages with keys and digests, facts, error and the path of its report."""
    place = _place(home)
    pipeline.reap(place)
    record = place.store.run(run)
    page = place.home.runs / record.id / "report.html"
    return {
        "run": record.id,
        "name": record.name,
        "status": record.status,
        "started_at": record.started_at,
        "finished_at": record.ended_at,
        "error": record.error,
        "release": record.release,
        "report": str(page) if page.exists() else None,
        "stages": {entry.stage: pipeline.vars_of(entry) for entry in place.store.stages_of(record.id)},
        "host": record.host,
        "recipe": record.recipe,
    }


def compare(a: str, b: str, *, home: Homeish = None) -> dict[str, Any]:
    """Two runs' tuned models on the test rows they share, with an exact paired test."""
    from luthier import statistics

    place = _place(home)
    samples: list[dict[str, float]] = []
    result: dict[str, Any] = {}
    for label, prefix in (("a", a), ("b", b)):
        record = place.store.run(prefix)
        stages = {entry.stage: entry for entry in place.store.stages_of(record.id)}
        if "evaluate" not in stages:
            raise NotFound(f"run {record.id} has no scorecard", hint="its evaluate stage did not finish")
        folder = place.home.artifact(stages["evaluate"].digest)
        tuned = artifacts.read_json(folder / "scorecard.json")["systems"]["tuned"]
        rows = artifacts.read_jsonl(folder / "samples.jsonl")
        samples.append({row["id"]: row.get("rewards", row["correct"])["tuned"] for row in rows})
        result[label] = {"run": record.id, "name": record.name, "status": record.status, "tuned": tuned}
    shared = sorted(samples[0].keys() & samples[1].keys())
    wins = sum(samples[1][row] > samples[0][row] for row in shared)
    losses = sum(samples[0][row] > samples[1][row] for row in shared)
    return result | {
        "rows": len(shared),
        "b_wins": wins,
        "b_losses": losses,
        "p": statistics.mcnemar(wins, losses),
    }


def releases(name: str | None = None, *, home: Homeish = None) -> list[dict[str, Any]]:
    """Releases, newest first, with the aliases that stand on each."""
    place = _place(home)
    if name is not None and name not in place.store.names():
        raise NotFound(f"no release of {name!r}", hint=_near(name, place.store.names()))
    found = []
    for record in place.store.releases(name):
        aliases = [
            alias for alias, digest in place.store.aliases(record.name).items() if digest == record.digest
        ]
        found.append(
            {
                "name": record.name,
                "digest": record.digest,
                "accepted": record.accepted,
                "aliases": sorted(aliases),
                "run": record.run_id,
                "at": record.at,
            }
        )
    return found


def promote(
    model: str,
    *,
    to: str = "production",
    reason: str = "promoted",
    actor: str = "local",
    home: Homeish = None,
) -> dict[str, Any]:
    """Move an alias onto a release: one row. `model` is NAME (its `staging`), NAME@ALIAS or NAME@DIGEST."""
    if not re.fullmatch(ALIAS, to) or re.fullmatch(r"[0-9a-f]{12,}", to):
        raise RecipeError(f"{to!r} cannot be an alias", hint="lower-case letters, digits and -, not a digest")
    place = _place(home)
    record = find_release(model if "@" in model else f"{model}@staging", place.store)
    if not record.accepted:
        raise StoreError(
            f"release {record.digest[:12]} of {record.name} was refused by its gates",
            hint=f"see why: luthier show {record.run_id}",
        )
    artifacts.verify(place.home.artifact(record.digest), deep=False)
    return _move(place.store, record, to, actor, reason)


def rollback(
    name: str, *, alias: str = "production", actor: str = "local", home: Homeish = None
) -> dict[str, Any]:
    """Move an alias back to what it stood on before its last promotion: one row, nothing is rebuilt."""
    place = _place(home)
    stack: list[str] = []
    for move in reversed(place.store.history(name, alias)):
        if move.reason == "rollback" and len(stack) > 1:
            stack.pop()
        else:
            stack.append(move.digest)
    if not stack:
        raise NotFound(f"{name}@{alias} was never set", hint=_near(name, place.store.names()))
    if len(stack) == 1:
        raise NotFound(
            f"{name}@{alias} stands on its first release, {stack[0][:12]}; there is nothing to go back to",
            hint=f"`luthier releases {name}` lists them all; `luthier promote {name}@DIGEST` moves it to any",
        )
    record = place.store.release(name, stack[-2])
    artifacts.verify(place.home.artifact(record.digest), deep=False)
    return _move(place.store, record, alias, actor, "rollback")


def lineage(what: str, *, home: Homeish = None) -> dict[str, Any]:
    """Where a release comes from; or, given the id of a training row, which releases learnt from it."""
    place = _place(home)
    if "@" not in what and what not in place.store.names():
        return _row_lineage(what, place)
    record = find_release(what, place.store)
    facts = dict(record.facts)
    base = artifacts.read_json(place.home.artifact(facts["model"]) / "base.json")
    card = artifacts.read_json(place.home.artifact(facts["data"]) / "card.json")
    aliases = place.store.aliases(record.name)
    return {
        "release": record.digest,
        "name": record.name,
        "aliases": sorted(alias for alias, digest in aliases.items() if digest == record.digest),
        "run": record.run_id,
        "accepted": record.accepted,
        "replaces": facts.get("champion"),
        "scorecard": facts["evaluate"],
        "adapter": facts["train"],
        "plan": facts["plan"],
        "base": {"artefact": facts["model"], **base},
        "data": {"artefact": facts["data"], **card},
    }


def parts() -> dict[str, dict[str, str]]:
    """Every part on every shelf with the first line of its docstring; nothing is imported."""
    import ast

    from luthier import plugins

    shelves = Path(plugins.__file__).parent
    found: dict[str, dict[str, str]] = {}
    for family in plugins.FAMILIES:
        lines = {}
        for name in plugins.names(family):
            tree = ast.parse((shelves / family / f"{name}.py").read_text("utf-8"))
            lines[name] = (ast.get_docstring(tree) or "").split("\n")[0]
        found[family] = lines
    return found


def monitor(model: str, *, since: str | None = None, home: Homeish = None) -> dict[str, Any]:
    """Stage 7 on the requests served so far, against the release's own baseline."""
    from luthier.recipe import Recipe

    place = _place(home)
    record = find_release(model if "@" in model else f"{model}@production", place.store)
    recipe = Recipe.model_validate(place.store.run(record.run_id or "").recipe)
    requests = place.store.requests(release=record.digest, since=since)
    return pipeline.watch(recipe, record, requests, place)


def doctor(*, home: Homeish = None) -> Iterator[dict[str, Any]]:
    """Check the machine and the home, one finding at a time: {"check", "ok", "found", "hint"}."""
    from luthier import health

    return health.checks(Home.at(home))


def chat(
    model: str, messages: Iterable[str], *, max_tokens: int = 256, home: Homeish = None
) -> Iterator[str]:
    """Say `messages` to a model, one after the other, in this process; yields the answers in pieces.

    A model is a release, a base, or what a job tuned (`ft:…`). With a release the conversation begins with
    the system prompt that all of its training rows began with, if any.
    """
    from luthier.rows import Message, Role
    from luthier.serving.service import Options, Service

    place = _place(home)
    asked, prompt = model, None  # what is no release's name is the service's to find, or to refuse
    if model.partition("@")[0] in place.store.names():
        release = find_release(model if "@" in model else f"{model}@production", place.store)
        asked, prompt = f"{release.name}@{release.digest}", _system_prompt(release, place.store)
    turns = [Message(Role.SYSTEM, prompt)] if prompt else []
    with Service(place.store, place.home) as service:
        for message in messages:
            turns.append(Message(Role.USER, message))
            answer = []
            for piece in service.talk(asked, turns, Options(max_tokens=max_tokens)):
                answer.append(piece)
                yield piece
            yield "\n"
            turns.append(Message(Role.ASSISTANT, "".join(answer) or " "))


def _system_prompt(release: ReleaseRecord, store: Store) -> str | None:
    from luthier.recipe import Recipe

    recipe = Recipe.model_validate(store.run(release.run_id or "").recipe)
    prompts = {source.chat.system if source.chat else None for source in recipe.data.sources}
    return prompts.pop() if len(prompts) == 1 else None


def find_release(model: str, store: Store) -> ReleaseRecord:
    """The release behind NAME@ALIAS or NAME@DIGEST (12 or more hex digits)."""
    name, _, selector = model.partition("@")
    if name not in store.names():
        raise NotFound(f"no model is called {name!r}", hint=_near(name, store.names()))
    digest = store.resolve(name, selector)
    try:
        return store.release(name, digest or selector)
    except LuthierError as error:
        known = sorted(store.aliases(name))
        raise NotFound(
            f"{name} has no alias or release {selector!r}", hint=f"aliases: {', '.join(known) or 'none yet'}"
        ) from error


def _place(home: Homeish) -> Place:
    opened = Home.at(home)
    return Place(opened, Store.open(opened.database), Path.cwd(), _quiet)


def _move(store: Store, record: ReleaseRecord, alias: str, actor: str, reason: str) -> dict[str, Any]:
    current = store.resolve(record.name, alias)
    move = store.move_ref(record.name, alias, record.digest, expected=current, actor=actor, reason=reason)
    return {
        "name": move.name,
        "alias": move.alias,
        "digest": move.digest,
        "previous": move.previous,
        "moved": current != record.digest,
        "reason": move.reason,
        "at": move.at,
    }


def _row_lineage(row: str, place: Place) -> dict[str, Any]:
    found = []
    for record in place.store.releases(None):
        ledger = place.home.artifact(record.facts["train"]) / "ledger.jsonl"
        learnt = (entry for entry in artifacts.read_jsonl(ledger) if "skipped" not in entry)
        steps = [entry["step"] for entry in learnt if row in entry["rows"]]
        if steps:
            aliases = place.store.aliases(record.name)
            standing = sorted(alias for alias, digest in aliases.items() if digest == record.digest)
            found.append({"release": record.digest, "name": record.name, "aliases": standing, "steps": steps})
    if not found:
        raise NotFound(
            f"no model and no training row is called {row!r}",
            hint=_near(row, place.store.names()) or "give NAME@ALIAS, NAME@DIGEST or a 16-hex row id",
        )
    return {"row": row, "learnt_by": found}


def _near(name: str, known: Sequence[str]) -> str:
    from luthier import plugins

    return plugins.unknown("model", name, known) if known else "no release yet: luthier run RECIPE"


def describe(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain values: what `luthier run --json` prints."""
    stages = {record.stage: pipeline.vars_of(record) for record in outcome.stages}
    measured = ("useful_tokens", "train_seconds", "peak_rss_bytes", "loss_first", "loss_last")
    trained = stages.get("train", {}).get("facts", {})
    return {
        "run": outcome.run_id,
        "name": outcome.name,
        "status": outcome.status,
        "stages": stages,
        "training": {name: trained[name] for name in measured if name in trained},
        "release": outcome.release,
        "report": str(outcome.report) if outcome.report else None,
    }
