"""Which share of a name's requests another release answers (canary) or answers unseen (shadow).

A split is an append-only row, like a move of an alias, and every server that shares the store follows it
from the next request on. Who meets the challenger is a hash of who asks, salted with the split's id: the
same user stays on the same side for the split's life, and another split draws anew (the usual way of
online experiments; Kohavi et al., 2009). A split names the champion it began against: once the alias has
moved elsewhere it is void. It does not know requests, tokens or verdicts.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import case, func, insert, select

from luthier.chain import Deed
from luthier.errors import NotFound, RecipeError, StoreError
from luthier.owners import owner
from luthier.schema.splits import COMPARISONS, SPLITS
from luthier.store import Store
from luthier.store_engine import Refused, now


class Kind(StrEnum):
    CANARY = "canary"
    SHADOW = "shadow"


class Action(StrEnum):
    BEGIN = "begin"
    STOP = "stop"
    FINISH = "finish"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Split:
    """One row. In force while its action is `begin` and it is the latest of its name and kind."""

    id: str
    name: str
    kind: Kind
    turn: int
    action: Action
    digest: str
    champion: str
    percent: float
    actor: str
    reason: str
    facts: Mapping[str, Any]
    at: str

    @property
    def in_force(self) -> bool:
        return self.action is Action.BEGIN

    def takes(self, who: str) -> bool:
        """Whether the challenger answers this user."""
        drawn = hashlib.sha256(f"{self.id}\0{who}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(drawn[:8], "big") < self.percent / 100 * 2**64


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a shadow answered beside its champion: never the texts themselves."""

    split: str
    champion: str
    challenger: str
    same: bool
    similarity: float | None
    champion_tokens: int
    challenger_tokens: int
    champion_s: float
    challenger_s: float
    error: str | None = None


class Splits:
    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(self, name: str, kind: Kind, digest: str, percent: float, actor: str) -> Split:
        """Split the traffic of NAME@production; refused while another split of the kind is in force."""
        if not 0 < percent <= 100:
            raise RecipeError(f"{percent:g} is not a percentage above 0", hint="--percent 10")
        champion = self._store.resolve(name, "production")
        if champion is None:
            raise NotFound(f"{name} has no production release to compare with", hint="promote one first")
        if champion == digest:
            raise StoreError(f"{digest[:12]} is in production already", hint="choose another release")
        if not self._store.release(name, digest).accepted:
            raise StoreError(f"release {digest[:12]} was refused by its gates and meets no user")
        last = self.last(name, kind)
        if last is not None and last.in_force and last.champion == champion:
            raise StoreError(
                f"{name} has a {kind.value} already: {last.digest[:12]} at {last.percent:g} %",
                hint=f"luthier {kind.value} {name} --stop",
            )
        row = Split(
            secrets.token_hex(6), name, kind, last.turn + 1 if last else 1, Action.BEGIN, digest, champion,
            float(percent), actor, "began", {}, now(),
        )  # fmt: skip
        return self._add(row)

    def end(self, split: Split, action: Action, actor: str, reason: str, facts: Mapping[str, Any]) -> Split:
        """The row that ends a split. Of those who would end it at the same time, one does."""
        row = Split(
            split.id, split.name, split.kind, split.turn + 1, action, split.digest, split.champion,
            split.percent, actor, reason, facts, now(),
        )  # fmt: skip
        return self._add(row)

    def last(self, name: str, kind: Kind) -> Split | None:
        """The latest row of a name and kind."""
        found = self.history(name, kind, limit=1)
        return found[0] if found else None

    def history(self, name: str, kind: Kind, limit: int = 50) -> list[Split]:
        """Newest first."""
        query = select(SPLITS).where(SPLITS.c.name == name, SPLITS.c.kind == kind.value)
        return [_split(row) for row in self._store.rows(query.order_by(SPLITS.c.turn.desc()).limit(limit))]

    def in_force(self, name: str, champion: str) -> dict[Kind, Split]:
        """What holds for requests that `champion` would answer; one indexed read, for each request."""
        newest = (
            select(SPLITS.c.kind, func.max(SPLITS.c.turn).label("turn"))
            .where(SPLITS.c.name == name)
            .group_by(SPLITS.c.kind)
            .subquery()
        )
        query = select(SPLITS).join(
            newest,
            (SPLITS.c.name == name) & (SPLITS.c.kind == newest.c.kind) & (SPLITS.c.turn == newest.c.turn),
        )
        found = [_split(row) for row in self._store.rows(query)]
        return {split.kind: split for split in found if split.in_force and split.champion == champion}

    def compare(self, comparison: Comparison) -> None:
        with self._store.writing() as connection:
            connection.execute(insert(COMPARISONS), {**asdict(comparison), "at": now()})

    def compared(self, split_id: str) -> dict[str, Any]:
        """A shadow's answers beside its champion's, summed up."""
        c = COMPARISONS.c
        whole = select(
            func.count().label("answers"),
            func.count(c.error).label("errors"),
            func.sum(case((c.same, 1), else_=0)).label("same"),
            func.avg(c.similarity).label("similarity"),
            func.avg(c.champion_s).label("champion_s"),
            func.avg(c.challenger_s).label("challenger_s"),
        ).where(c.split == split_id)
        return dict(self._store.rows(whole)[0])

    def _add(self, split: Split) -> Split:
        values = {**asdict(split), "kind": split.kind.value, "action": split.action.value}
        values["facts"] = json.dumps(dict(split.facts), sort_keys=True, allow_nan=False)
        try:
            told = {name: values[name] for name in ("id", "digest", "champion", "percent", "reason")}
            whose = owner(self._store, split.name)
            deed = Deed(f"{split.kind.value} {split.action.value}", split.name, split.actor, whose, told)
            with self._store.writing(deed) as connection:
                connection.execute(insert(SPLITS), values)
        except Refused as error:
            raise StoreError(
                f"the {split.kind.value} of {split.name} was changed by someone else at the same time",
                hint=f"look again: luthier {split.kind.value} {split.name}",
            ) from error
        return split


def _split(row: Any) -> Split:
    return Split(
        row["id"], row["name"], Kind(row["kind"]), row["turn"], Action(row["action"]), row["digest"],
        row["champion"], row["percent"], row["actor"], row["reason"], json.loads(row["facts"]), row["at"],
    )  # fmt: skip
