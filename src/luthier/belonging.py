"""Whose a release's name is, told from the name alone and the table of jobs.

A release made by a recipe on the command line belongs to the tenant `local`; one made by a fine-tuning job
goes by the job's id and belongs to the job's tenant. It stands below the store, so that the store's own audit
entries can say whose thing was moved. It does not know who else may ask for a name (`owners` does).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Select, select

from luthier.schema.jobs import JOBS

LOCAL = "local"
NOBODY = ""  # of a job whose row is gone: its releases are the command line's alone
JOB = "ftjob-"


def owner(rows: Callable[[Select[Any]], Sequence[Any]], name: str) -> str:
    """The tenant that the name belongs to. rows: what reads the store."""
    if not name.startswith(JOB):
        return LOCAL
    found = rows(select(JOBS.c.tenant).where(JOBS.c.id == name))
    return str(found[0]["tenant"]) if found else NOBODY
