"""Who is calling, and what for: a caller has a tenant and scopes.

It does not know where keys are kept, nor HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key may be used for; `admin` implies all."""

    ADMIN = "admin"
    TRAIN = "train"
    INFER = "infer"
    READ = "read"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose request this is. A tenant sees its own files, jobs and models, and what is shared."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]


LOCAL = Caller("served", "local", frozenset({Scope.ADMIN}))  # the one key that `luthier serve` prints
