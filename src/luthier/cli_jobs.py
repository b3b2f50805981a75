"""Fine-tuning jobs on the command line: `luthier jobs …`, and `luthier work`, which carries them out.

A thin door onto `jobs`: it works on a home with or without a server. Nothing heavy is imported before a verb
needs it.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier import tables
from luthier.door import AsJson, Home, door, errors, results, who

app = typer.Typer(no_args_is_help=True, help="Fine-tuning jobs: ask for one, follow it, stop it.")

Id = Annotated[str, typer.Argument(metavar="JOB", help="a job's id: ftjob-…", show_default=False)]


@app.command()
def create(
    model: Annotated[str, typer.Argument(help="a base model's name (`luthier bases list`)")],
    training_file: Annotated[str, typer.Argument(help="JSONL on this disk, or the id of an uploaded file")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="e.g. method.type=dpo, hyperparameters.n_epochs=2"),
    ] = None,
    quote: Annotated[bool, typer.Option(help="only tell tokens, minutes and price; ask for nothing")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Put a job in the queue; a worker (`luthier work`, or the server's) carries it out.

    `--set` takes any field of OpenAI's request: validation_file, suffix, seed, metadata.team,
    method.dpo.hyperparameters.beta … A value is JSON, or else a word.
    """
    with door(as_json):
        asked: dict[str, Any] = {"model": model, "training_file": training_file}
        for setting in set or ():
            name, _, value = setting.partition("=")
            _put(asked, name.split("."), value)
        if quote:
            _show(as_json, _jobs(home).quote(asked), tables.quote)
        else:
            _show(as_json, _jobs(home).create(asked), tables.job)


@app.command("list")
def list_(home: Home = None, as_json: AsJson = False, limit: int = 50) -> None:
    """List jobs, newest first."""
    with door(as_json):
        _show(as_json, _jobs(home).list(limit), tables.jobs)


@app.command()
def show(job: Id, home: Home = None, as_json: AsJson = False) -> None:
    """Show one job: state, plan, latest events, checkpoints, and why it failed."""
    with door(as_json):
        _show(as_json, _jobs(home).show(job), tables.job)


@app.command()
def cancel(job: Id, home: Home = None, as_json: AsJson = False) -> None:
    """Stop a job for good."""
    with door(as_json):
        _show(as_json, _jobs(home).move(job, "cancel"), tables.job)


@app.command()
def pause(job: Id, home: Home = None, as_json: AsJson = False) -> None:
    """Save what a job has trained and stop it until it is resumed."""
    with door(as_json):
        _show(as_json, _jobs(home).move(job, "pause"), tables.job)


@app.command()
def resume(job: Id, home: Home = None, as_json: AsJson = False) -> None:
    """Let a paused job go on."""
    with door(as_json):
        _show(as_json, _jobs(home).move(job, "resume"), tables.job)


@app.command()
def follow(job: Id, home: Home = None, as_json: AsJson = False) -> None:
    """Print a job's events as they come, until it has ended."""
    with door(as_json):
        for event in _jobs(home).follow(job):
            if as_json:
                print(json.dumps(event), flush=True)
            else:
                tables.event(results, event)


def work(
    jobs: Annotated[int, typer.Option(help="so many at a time, if the memory is there", min=1)] = 1,
    parent: Annotated[
        int | None, typer.Option(hidden=True, help="work only while this process lives")
    ] = None,
    home: Home = None,
) -> None:
    """Carry out fine-tuning jobs until stopped; what is trained is saved, and the next worker goes on."""
    with door(False):
        from luthier.home import Home as Folder
        from luthier.jobs import verbs
        from luthier.jobs.work import Crew
        from luthier.jobs.work import work as carry_out
        from luthier.store import Store

        crew = Crew(verbs.terms(), jobs, parent=parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: crew.stop.set())
        opened = Folder.at(home)
        carry_out(Store.open(opened.database), opened, crew, lambda line: errors.print(line, highlight=False))


def import_openai(
    jobs: Annotated[Path, typer.Argument(help="JSON of client.fine_tuning.jobs.list()", show_default=False)],
    files: Annotated[Path | None, typer.Option(help="folder of FILE_ID.jsonl; default: beside JOBS")] = None,
    out: Annotated[Path, typer.Option(help="where recipes and rows go")] = Path("imported"),
    base: Annotated[
        str | None, typer.Option(help="base to train; default: the one of `serve --demo`")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Turn old OpenAI jobs into recipes for `luthier run`, and tell what cannot be carried over."""
    with door(as_json):
        from luthier.jobs import verbs

        found = verbs.import_openai(jobs, files or jobs.parent, out, base, home)
        _show(as_json, found, tables.imported)
        if not any(one["recipe"] for one in found):
            raise typer.Exit(3)


def _put(asked: dict[str, Any], path: list[str], value: str) -> None:
    """Set one field of a request, however deep it lies."""
    for step in path[:-1]:
        asked = asked.setdefault(step, {})
    try:
        asked[path[-1]] = json.loads(value)
    except ValueError:
        asked[path[-1]] = value


def _jobs(home: Path | None) -> Any:
    from luthier.jobs.verbs import Jobs

    return Jobs(home, who())


def _show(as_json: bool, found: Any, draw: Any) -> None:
    if as_json:
        print(json.dumps(found), flush=True)
    else:
        draw(results, found)
