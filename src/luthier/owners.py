"""Whose a release's name is, and who else may ask for it.

A release made by a recipe on the command line belongs to the tenant `local`; one made by a fine-tuning job
belongs to the job's tenant, from the moment it exists. The server's admin may share a name: then every tenant
may ask for it. `tenant` None is this machine's own command line, which sees everything. It does not know keys
or doors.
"""

from __future__ import annotations

from sqlalchemy import delete, insert, select

from luthier import belonging
from luthier.belonging import JOB, LOCAL, NOBODY
from luthier.chain import Deed
from luthier.errors import NotFound
from luthier.plugins import unknown
from luthier.schema.uploads import SHARED
from luthier.store import Store
from luthier.store_engine import now

__all__ = ["JOB", "LOCAL", "NOBODY", "owner", "share", "shared", "visible"]


def visible(store: Store, name: str, tenant: str | None) -> bool:
    """Whether `tenant` may ask for the releases of `name`."""
    return tenant is None or tenant == owner(store, name) or name in shared(store)


def owner(store: Store, name: str) -> str:
    """The tenant that the name belongs to; a job's releases go by the job's id."""
    return belonging.owner(store.rows, name)


def shared(store: Store) -> set[str]:
    return {row["name"] for row in store.rows(select(SHARED.c.name))}


def share(store: Store, name: str, *, actor: str, on: bool = True) -> None:
    """Let every tenant ask for a name, or only its owner again; saying it twice changes nothing."""
    if name not in store.names():
        raise NotFound(unknown("model", name, store.names()), hint="`luthier releases` lists them")
    deed = Deed("share" if on else "share off", name, actor, owner(store, name))
    with store.writing(deed) as connection:
        connection.execute(delete(SHARED).where(SHARED.c.name == name))
        if on:
            connection.execute(insert(SHARED), {"name": name, "actor": actor, "at": now()})
