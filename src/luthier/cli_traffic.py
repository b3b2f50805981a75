"""Canaries and shadows on the command line: a thin door onto `serving.verbs`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from luthier import tables
from luthier.door import AsJson, Home, door, results, who
from luthier.errors import RecipeError

Name = Annotated[str, typer.Argument(help="a model's name", show_default=False)]
To = Annotated[str | None, typer.Option(metavar="DIGEST|ALIAS", help="the release that is tried")]
Stop = Annotated[bool, typer.Option("--stop", help="end it; production answers everything again")]


@dataclass(frozen=True)
class _Asked:
    to: str | None
    percent: float
    stop: bool = False
    finish: bool = False


def canary(
    name: Name,
    to: To = None,
    percent: Annotated[float, typer.Option(help="share of users who meet it")] = 10.0,
    finish: Annotated[
        bool | None, typer.Option("--finish/--stop", help="end it: promoted to production, or not")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let a release answer some users; aborted by itself when it fails or is slow. Alone: how it stands."""
    _split("canary", name, _Asked(to, percent, finish is False, bool(finish)), home, as_json)


def shadow(
    name: Name,
    to: To = None,
    percent: Annotated[float, typer.Option(help="share of requests it answers, too")] = 20.0,
    stop: Stop = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let a release answer some requests unseen and compare. Alone: how alike the answers are."""
    _split("shadow", name, _Asked(to, percent, stop), home, as_json)


def register(app: typer.Typer) -> None:
    app.command()(canary)
    app.command()(shadow)


def _split(kind: str, name: str, asked: _Asked, home: Path | None, as_json: bool) -> None:
    with door(as_json):
        from luthier.home import Home as Opened
        from luthier.serving import verbs
        from luthier.serving.splits import Action, Kind
        from luthier.store import Store

        if (asked.to is not None) + asked.stop + asked.finish > 1:
            raise RecipeError("one thing at a time: --to, --stop or --finish")
        store = Store.open(Opened.at(home).database)
        if asked.to is not None:
            told = verbs.begin(store, name, Kind(kind), asked.to, asked.percent, who())
        elif asked.stop or asked.finish:
            told = verbs.end(store, name, Kind(kind), Action.FINISH if asked.finish else Action.STOP, who())
        else:
            told = verbs.look(store, name, Kind(kind))
        if as_json:
            print(json.dumps(told), flush=True)
        else:
            tables.split(results, told)
