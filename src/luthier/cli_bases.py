"""`luthier bases` and `luthier share`: the models of a server by name, and who may ask for them.

A thin door onto `admit`, `bases` and `owners`; it does not know how a base is sealed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier import tables
from luthier.door import AsJson, Home, door, errors, results, who

app = typer.Typer(no_args_is_help=True, help="Base models by name: what can be tuned, and answers as it is.")

Licence = Annotated[str, typer.Option(help="SPDX identifier of the weights; LicenseRef-own for your own")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="what to ask for it by", show_default=False)],
    given: Annotated[
        Path, typer.Argument(metavar="FROM", help="a recipe (its `model:`), a model folder or a .gguf")
    ],
    licence: Licence = "LicenseRef-own",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Seal a base model and give it a name. The same name again takes the place of what was there."""
    with door(as_json):
        made = admitted(name, given, licence, home)
        if as_json:
            print(json.dumps(made), flush=True)
        else:
            tables.bases(results, [made])


@app.command("list")
def listed(home: Home = None, as_json: AsJson = False) -> None:
    """List the base models by name."""
    with door(as_json):
        from luthier import admit

        found = admit.listed(home)
        if as_json:
            print(json.dumps(found), flush=True)
        else:
            tables.bases(results, found)


def share(
    name: Annotated[str, typer.Argument(help="a release's name", show_default=False)],
    off: Annotated[bool, typer.Option("--off", help="only its owner again")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Let every tenant of this server ask for the releases of a name."""
    with door(as_json):
        from luthier import owners
        from luthier.home import Home as Place
        from luthier.store import Store

        owners.share(Store.open(Place.at(home).database), name, actor=who(), on=not off)
        if as_json:
            print(json.dumps({"name": name, "shared": not off}), flush=True)
        else:
            whose = "its owner's alone" if off else "shared with every tenant"
            results.print(f"{name} is {whose}")


def admitted(name: str | None, given: Path | None, licence: str, home: Path | None) -> dict[str, Any]:
    """A base made ready, with its progress on stderr; without `given` the demo's."""
    from luthier import admit
    from luthier.progress import Watch

    with Watch(errors) as watch:
        return admit.add(name, given, licence, home, watch.tell, who())
