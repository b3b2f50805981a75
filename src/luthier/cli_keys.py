"""`luthier keys` and `luthier audit`: who may come in, what they may spend, and what was done.

A thin door onto `keys` and `audit`; it does not know HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any

import typer

from luthier import tables
from luthier.door import AsJson, Home, door, results, who
from luthier.errors import RecipeError

app = typer.Typer(no_args_is_help=True, help="API keys: make, list and revoke them.")
audits = typer.Typer(no_args_is_help=True, help="The audit log: what was done, by whom, and proof of it.")

RATE = re.compile(r"([1-9]\d{0,8})/(min)|([1-9]\d{0,14})/(day|month)")
LIFE = re.compile(r"([1-9]\d{0,4})([mhd])")
UNITS = {"m": "minutes", "h": "hours", "d": "days"}


@app.command()
def create(  # noqa: PLR0913 - each is an option of the command
    tenant: Annotated[str, typer.Option(help="whose files, jobs and models it opens")] = "local",
    scopes: Annotated[str, typer.Option(help="of admin, train, infer, read; with commas")] = "infer,read",
    rate: Annotated[str | None, typer.Option(help="requests a minute, such as 60/min")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="such as 1000000/day, or 1000000/day,9000000/month")
    ] = None,
    at_once: Annotated[
        int | None, typer.Option(min=1, help="requests that one server works on at once")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="life, such as 30d, 12h or 15m")] = None,
    name: Annotated[str, typer.Option(help="a note for people")] = "",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Make a key. It is shown this once; the store keeps its hash."""
    with _opened(home, as_json) as store:
        from luthier import keys

        of_tokens = _tokens(tokens)
        budget = keys.Budget(
            _amount(rate, "min", "--rate"), of_tokens.get("day"), of_tokens.get("month"), at_once
        )
        granted = [_scope(scope.strip()) for scope in scopes.split(",") if scope.strip()]
        key, secret = keys.create(
            store, tenant, granted, origin=keys.Origin(name, who()), budget=budget, lives=_life(expires)
        )
        told = _plain(key)
        if as_json:
            print(json.dumps({**told, "key": secret}), flush=True)
        else:
            results.print(secret, markup=False, highlight=False, soft_wrap=True)
            tables.keys(results, [told])


@app.command("list")
def listed(
    tenant: Annotated[str | None, typer.Option(help="only this tenant's")] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """List keys, newest first; the keys themselves nobody can list."""
    with _opened(home, as_json) as store:
        from luthier import budgets, keys

        found = [
            _plain(key)
            | {
                "tokens_today": budgets.spent_today(store, key.id),
                "tokens_this_month": budgets.spent_this_month(store, key.id),
            }
            for key in keys.listed(store, tenant)
        ]
        if as_json:
            print(json.dumps(found), flush=True)
        else:
            tables.keys(results, found)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID")], home: Home = None, as_json: AsJson = False
) -> None:
    """From the next request on this key opens nothing."""
    with _opened(home, as_json) as store:
        from luthier import keys

        key = keys.revoke(store, key_id, who())
        if as_json:
            print(json.dumps(_plain(key)), flush=True)
        else:
            tables.keys(results, [_plain(key)])


@audits.command()
def verify(home: Home = None, as_json: AsJson = False) -> None:
    """Walk the whole chain; the first entry that was changed, moved or removed is named."""
    with _opened(home, as_json) as store:
        from luthier import audit

        found = audit.verify(store)
        if as_json:
            print(json.dumps(found), flush=True)
        else:
            results.print(f"whole: {found['entries']} entries, head {found['head'][:16]}")


@audits.command("show")
def shown(
    after: Annotated[int, typer.Option(help="only entries after this number")] = 0,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Show the log, oldest first."""
    with _opened(home, as_json) as store:
        from luthier import audit

        found = [asdict(entry) for entry in audit.entries(store, after)]
        if as_json:
            print(json.dumps(found), flush=True)
        else:
            tables.audit(results, found)


def register(above: typer.Typer) -> None:
    above.add_typer(app, name="keys")
    above.add_typer(audits, name="audit")


@contextmanager
def _opened(home: Any, as_json: bool) -> Iterator[Any]:
    with door(as_json):
        from luthier.home import Home as Opened
        from luthier.store import Store

        yield Store.open(Opened.at(home).database)


def _plain(key: Any) -> dict[str, Any]:
    """A key for people: everything but the key."""
    names = ("id", "tenant", "name", "prefix", "created_at", "expires_at", "revoked_at", "state")
    found = {name: getattr(key, name) for name in names}
    return found | {"scopes": sorted(key.scopes), **asdict(key.budget)}


def _scope(word: str) -> Any:
    from luthier.keys import Scope
    from luthier.plugins import unknown

    if word not in set(Scope):
        raise RecipeError(unknown("scope", word, tuple(Scope)), where="--scopes")
    return Scope(word)


def _amount(given: str | None, per: str, option: str) -> int | None:
    if given is None:
        return None
    found = RATE.fullmatch(given)
    if found is None or (found[2] or found[4]) != per:
        raise RecipeError(f"{given!r} is no amount", where=option, hint=f"write it as 60/{per}")
    return int(found[1] or found[3])


def _tokens(given: str | None) -> dict[str, int]:
    """Amounts by period, such as `1000000/day,9000000/month`."""
    found: dict[str, int] = {}
    for part in given.split(",") if given is not None else ():
        per = "month" if part.endswith("/month") else "day"
        if per in found:
            raise RecipeError(f"two amounts of tokens a {per}", where="--tokens", hint="give one")
        found[per] = _amount(part.strip(), per, "--tokens") or 0
    return found


def _life(given: str | None) -> timedelta | None:
    if given is None:
        return None
    found = LIFE.fullmatch(given)
    if found is None:
        raise RecipeError(f"{given!r} is no length of time", where="--expires", hint="write 30d, 12h or 15m")
    return timedelta(**{UNITS[found[2]]: int(found[1])})
