"""Entry models by name: those that this server may tune, and answers with as they are.

A base's name stands for a recipe's `model:` section and for the sealed artefact that the model stage made of
it, so its digest, licence and tokenizer are known before anyone asks for it. The names are the whole
server's: every tenant may use them. How a base gets in is `admit`'s work; this module knows rows alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import RowMapping

from luthier.chain import Deed
from luthier.errors import ModelError, NotFound
from luthier.plugins import unknown
from luthier.schema.uploads import BASES
from luthier.store import Store

NAME = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
)  # no colon and no @: these have a meaning in models' names


@dataclass(frozen=True, slots=True)
class Entry:
    """`section`: a recipe's `model:`. `model`: the artefact's digest; `base`: that of the weights in it.

    `facts`: architecture, parameters, licence, dtype, and `context`, the tokens it reads in all.
    """

    name: str
    section: Mapping[str, Any]
    model: str
    base: str
    facts: Mapping[str, Any]
    created_at: int = 0


def get(store: Store, name: str) -> Entry | None:
    """The base of that name, if there is one."""
    rows = store.rows(select(BASES).where(BASES.c.name == name)) if NAME.fullmatch(name) else ()
    return _base(rows[0]) if rows else None


def find(store: Store, name: str) -> Entry:
    """The base of that name; `NotFound` with the nearest one."""
    found = get(store, name)
    if found is not None:
        return found
    known = [base.name for base in listed(store)]
    if not known:
        raise NotFound("this server has no base model yet", hint="luthier bases add NAME FOLDER")
    raise NotFound(unknown("base model", name[:80], known), hint="`luthier bases list` shows them")


def listed(store: Store) -> list[Entry]:
    """All of them, in the order they came."""
    return [_base(row) for row in store.rows(select(BASES).order_by(BASES.c.seq))]


def enter(store: Store, base: Entry, actor: str) -> Entry:
    """Put a base under its name, in place of what was there."""
    named(base.name)
    if base.name in store.names():
        raise ModelError(f"{base.name!r} is the name of a release", hint="give the base another name")
    row = {
        "name": base.name,
        "section": json.dumps(dict(base.section), sort_keys=True),
        "model": base.model,
        "base": base.base,
        "facts": json.dumps(dict(base.facts), sort_keys=True),
        "created_at": int(time.time()),
    }
    facts = {"model": base.model, "base": base.base}
    with store.writing(Deed("bases add", base.name, actor, "local", facts)) as connection:
        connection.execute(delete(BASES).where(BASES.c.name == base.name))
        connection.execute(insert(BASES), row)
    return find(store, base.name)


def named(name: str) -> str:
    """The name, if a base may be called so."""
    if not NAME.fullmatch(name):
        hint = "letters, digits, dot, dash and underscore; at most 64, the first a letter or digit"
        raise ModelError(f"{name!r} cannot be a base's name", hint=hint)
    return name


def _base(row: RowMapping) -> Entry:
    return Entry(
        row["name"], json.loads(row["section"]), row["model"], row["base"], json.loads(row["facts"]),
        row["created_at"],
    )  # fmt: skip
