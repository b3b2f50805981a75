"""The store: runs, stages, releases, refs, events and requests as rows of SQLite or PostgreSQL.

Sources: https://www.sqlite.org/wal.html (WAL with `synchronous=FULL`: a commit is on disk when it returns)
and git's refs (`update-ref <new> <old>`: a ref moves only from where the mover believes it to be). Promotion
is one INSERT that carries its own condition: among racing threads, processes and machines just one wins.

Every write is acknowledged after its commit; every call takes its own connection, so a `Store` may be shared
by threads (not across `fork`). Times are UTC, ISO 8601. The store keeps what it is told: it knows no gate, no
artefact folder, and not whether a promotion is wise.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, String, Table, bindparam, func, insert, literal, select, true, update
from sqlalchemy.engine import Connection, RowMapping

from luthier import belonging, chain, store_engine
from luthier.chain import Deed
from luthier.errors import NotFound, StoreError
from luthier.schema.keys import AUDIT
from luthier.schema.runs import EVENTS, REFS, RELEASES, REQUESTS, RUNS, STAGES
from luthier.store_engine import Refused, guard, now


@dataclass(frozen=True)
class RunRecord:
    id: str
    name: str
    status: str
    recipe: Mapping[str, Any]
    host: Mapping[str, Any]
    release: str | None
    error: str | None
    started_at: str
    ended_at: str | None


@dataclass(frozen=True)
class StageRecord:
    """One stage of one run; `run_id` is filled in by the store."""

    stage: str
    key: str
    digest: str
    reused: bool
    seconds: float
    facts: Mapping[str, Any]
    at: str = field(default_factory=now)
    run_id: str = ""


@dataclass(frozen=True)
class ReleaseRecord:
    digest: str
    name: str
    run_id: str | None
    accepted: bool
    facts: Mapping[str, Any]
    at: str = field(default_factory=now)


@dataclass(frozen=True)
class RefMove:
    id: int
    name: str
    alias: str
    digest: str
    previous: str | None
    actor: str
    reason: str
    at: str


@dataclass(frozen=True)
class EventRecord:
    id: int
    at: str
    kind: str
    facts: Mapping[str, Any]
    run_id: str | None


@dataclass(frozen=True)
class RequestRecord:
    """One answered or refused request; never its text."""

    at: str
    release: str | None
    model: str
    status: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    total_s: float = 0.0
    error: str | None = None
    key_id: str | None = None
    tenant: str | None = None


class Store:
    """One database, open and migrated. Use `Store.open`."""

    def __init__(self, engine: Engine, where: str) -> None:
        self.where = where
        self._engine = engine
        self._writer = engine.execution_options(**store_engine.WRITES)
        postgres = engine.dialect.name == "postgresql"
        self._reader = engine.execution_options(isolation_level="AUTOCOMMIT") if postgres else engine

    @classmethod
    def open(cls, home_or_url: Path | str) -> Store:
        """Open (and create or migrate) the database of a home folder, or the one behind a URL."""
        return cls(*store_engine.reach(home_or_url))

    def close(self) -> None:
        self._engine.dispose()

    # ---- runs and their stages ----------------------------------------------------------------------

    def begin_run(self, name: str, recipe: Mapping[str, Any], host: Mapping[str, Any]) -> str:
        run_id = secrets.token_hex(6)
        row = {
            "id": run_id,
            "name": name,
            "status": "running",
            "recipe": recipe,
            "host": host,
            "started_at": now(),
        }
        self._insert(RUNS, row)
        return run_id

    def end_run(self, run_id: str, status: str, release: str | None = None, error: str | None = None) -> None:
        ended_at = None if status == "running" else now()
        values = _plain({"status": status, "release": release, "error": error, "ended_at": ended_at})
        with self.writing() as connection:
            if not connection.execute(update(RUNS).where(RUNS.c.id == run_id).values(values)).rowcount:
                raise NotFound(f"no run {run_id!r}", where=self.where)

    def runs(self, limit: int = 50) -> list[RunRecord]:
        """The latest runs, newest first."""
        return [_run(row) for row in self.rows(select(RUNS).order_by(RUNS.c.seq.desc()).limit(limit))]

    def run(self, prefix: str) -> RunRecord:
        """The one run whose id begins so."""
        query = select(RUNS).where(RUNS.c.id.startswith(prefix, autoescape=True)).order_by(RUNS.c.seq.desc())
        rows = self.rows(query.limit(6)) if prefix else []
        return _run(self._only(rows, "run", prefix, "id", "`luthier runs` lists them"))

    def record_stage(self, run_id: str, record: StageRecord) -> None:
        self._insert(STAGES, {**asdict(record), "run_id": run_id})

    def stages_of(self, run_id: str) -> list[StageRecord]:
        """What a run did, in order."""
        return [
            _stage(row)
            for row in self.rows(select(STAGES).where(STAGES.c.run_id == run_id).order_by(STAGES.c.seq))
        ]

    def find_stage(self, key: str) -> StageRecord | None:
        """The latest time this key was really worked out (not reused) and not forgotten since."""
        worked = (STAGES.c.key == key, STAGES.c.reused.is_(False), STAGES.c.forgotten_at.is_(None))
        rows = self.rows(select(STAGES).where(*worked).order_by(STAGES.c.seq.desc()).limit(1))
        return _stage(rows[0]) if rows else None

    def forget_stage(self, key: str) -> None:
        """Never reuse this key's rows again (their artefact is damaged or gone); they stay as history."""
        with self.writing() as connection:
            known = (STAGES.c.key == key, STAGES.c.forgotten_at.is_(None))
            connection.execute(update(STAGES).where(*known).values(forgotten_at=now()))

    # ---- releases and refs --------------------------------------------------------------------------

    def add_release(self, record: ReleaseRecord) -> None:
        """Idempotent: a release is named by its content, so the first row for (name, digest) stays."""
        if self._engine.dialect.name == "postgresql":
            from sqlalchemy.dialects.postgresql import insert as insert_once
        else:
            from sqlalchemy.dialects.sqlite import insert as insert_once  # type: ignore[assignment]
        statement = insert_once(RELEASES).values(_plain(asdict(record))).on_conflict_do_nothing()
        with self.writing() as connection:
            connection.execute(statement)

    def release(self, name: str | None, digest_prefix: str) -> ReleaseRecord:
        """The one release (of `name`, if given) whose digest begins so."""
        query = select(RELEASES).where(RELEASES.c.digest.startswith(digest_prefix, autoescape=True))
        if name is not None:
            query = query.where(RELEASES.c.name == name)
        rows = self.rows(query.order_by(RELEASES.c.seq.desc()).limit(6)) if digest_prefix else []
        kind = "release" if name is None else f"release of {name}"
        return _release(self._only(rows, kind, digest_prefix, "digest", "`luthier releases` lists them"))

    def releases(self, name: str | None = None) -> list[ReleaseRecord]:
        """Releases, newest first."""
        query = select(RELEASES).order_by(RELEASES.c.seq.desc())
        return [
            _release(row)
            for row in self.rows(query if name is None else query.where(RELEASES.c.name == name))
        ]

    def names(self) -> list[str]:
        """Every name that has a release, sorted."""
        return sorted(row["name"] for row in self.rows(select(RELEASES.c.name).distinct()))

    def move_ref(
        self, name: str, alias: str, digest: str, *, expected: str | None, actor: str, reason: str
    ) -> RefMove:
        """One INSERT: point NAME@ALIAS at a release, if it is still at `expected` (None: at nothing).

        Whoever moves it, the audit log tells of it by the same commit.
        A move to where it already points is no move: the last one is returned and no row is written.
        """
        if digest == expected:
            last = self.history(name, alias)[:1]
            if last and last[0].digest == digest:
                return last[0]
            raise self._lost(name, alias, expected)
        move = {"name": name, "alias": alias, "digest": digest, "expected": expected, "at": now()}
        told, whose = {"from": expected, "to": digest, "reason": reason}, belonging.owner(self.rows, name)
        try:
            with self.writing(Deed("move alias", f"{name}@{alias}", actor, whose, told)) as connection:
                made = connection.execute(_MOVE, _plain({**move, "actor": actor, "reason": reason}))
                row = made.mappings().one_or_none()
                if row is None:  # nothing moved, so nothing is told
                    raise self._lost(name, alias, expected)
        except Refused as error:
            if not self.rows(
                select(RELEASES.c.seq).where(RELEASES.c.name == name, RELEASES.c.digest == digest)
            ):
                hint = "`luthier releases` lists them"
                raise NotFound(f"no release {digest[:12]} of {name}", where=self.where, hint=hint) from error
            raise self._lost(name, alias, expected) from error  # another mover took this turn meanwhile
        return _move(row)

    def _lost(self, name: str, alias: str, expected: str | None) -> StoreError:
        last = self.history(name, alias)[:1]
        there = f"it points at {last[0].digest[:12]}" if last else "it points at nothing yet"
        by = f"; moved by {last[0].actor} at {last[0].at} ({last[0].reason})" if last else ""
        return StoreError(
            f"{name}@{alias} was not moved: {there}, not at {expected[:12] if expected else 'nothing'}{by}",
            where=self.where,
            hint="look at the current release, then decide again",
        )

    def resolve(self, name: str, alias: str) -> str | None:
        """The release that NAME@ALIAS points at now; quick, because a server asks for every request."""
        with guard(self.where), self._reader.connect() as connection:
            digest: str | None = connection.execute(_CURRENT, {"name": name, "alias": alias}).scalar()
        return digest

    def history(self, name: str, alias: str) -> list[RefMove]:
        """Every move of one alias, newest first."""
        query = select(REFS).where(REFS.c.name == name, REFS.c.alias == alias)
        return [_move(row) for row in self.rows(query.order_by(REFS.c.turn.desc()))]

    def aliases(self, name: str) -> dict[str, str]:
        """Where each alias of a name points now."""
        rows = self.rows(select(REFS.c.alias, REFS.c.digest).where(REFS.c.name == name).order_by(REFS.c.turn))
        return dict(sorted({row["alias"]: row["digest"] for row in rows}.items()))

    # ---- events and requests ------------------------------------------------------------------------

    def record_event(self, kind: str, facts: Mapping[str, Any], run_id: str | None = None) -> None:
        self._insert(EVENTS, {"at": now(), "kind": kind, "facts": facts, "run_id": run_id})

    def events(self, run_id: str | None = None) -> list[EventRecord]:
        """What happened, oldest first; of one run, or everything."""
        query = select(EVENTS).order_by(EVENTS.c.id)
        rows = self.rows(query if run_id is None else query.where(EVENTS.c.run_id == run_id))
        return [
            EventRecord(row["id"], row["at"], row["kind"], json.loads(row["facts"]), row["run_id"])
            for row in rows
        ]

    def log_request(self, record: RequestRecord) -> None:
        self._insert(REQUESTS, asdict(record))

    def requests(self, release: str | None = None, since: str | None = None) -> list[RequestRecord]:
        """Requests in the order they were logged; of one release, or at and after a time."""
        query = select(*(column for column in REQUESTS.c if column.name != "id")).order_by(REQUESTS.c.id)
        if release is not None:
            query = query.where(REQUESTS.c.release == release)
        if since is not None:
            query = query.where(REQUESTS.c.at >= since)
        return [RequestRecord(**row) for row in self.rows(query)]

    # ---- the database underneath --------------------------------------------------------------------

    def _insert(self, table: Table, row: Mapping[str, Any]) -> None:
        with self.writing() as connection:
            connection.execute(insert(table), _plain(row))

    def rows(self, query: Any) -> Sequence[RowMapping]:
        """What a query finds; for the rooms that keep tables of their own beside these."""
        with guard(self.where), self._reader.connect() as connection:
            return connection.execute(query).mappings().all()

    def _only(self, rows: Sequence[RowMapping], kind: str, prefix: str, column: str, hint: str) -> RowMapping:
        if not rows:
            raise NotFound(f"no {kind} {prefix!r}", where=self.where, hint=hint)
        exact = [row for row in rows if row[column] == prefix]
        if len(rows) > 1 and len(exact) != 1:
            found = ", ".join(f"{row['name']} {row[column][:16]}" for row in rows[:5])
            raise NotFound(f"{prefix!r} is ambiguous: {found}", where=self.where, hint="give more of it")
        return (exact or list(rows))[0]

    @contextmanager
    def writing(self, deed: Deed | None = None) -> Iterator[Connection]:
        """One transaction; when the block ends without an error it is committed and on disk.

        deed: what the audit log says of it, written by the same commit."""
        with guard(self.where), self._writer.begin() as connection:
            yield connection
            entry = chain.append(connection, deed) if deed is not None else None
        if entry is not None:
            chain.remember(self.where, self._audited, entry)

    def _audited(self, seq: int) -> str | None:
        rows = self.rows(select(AUDIT.c.hash).where(AUDIT.c.seq == seq))
        return str(rows[0]["hash"]) if rows else None


# The condition travels inside the INSERT: no row comes out of the SELECT unless the alias still points at
# `expected`, and UNIQUE (name, alias, turn) stops the second of two movers who saw the same turn.
_last = (
    select(REFS.c.turn, REFS.c.digest)
    .where(REFS.c.name == bindparam("name", type_=String), REFS.c.alias == bindparam("alias", type_=String))
    .order_by(REFS.c.turn.desc())
    .limit(1)
    .subquery("last")
)
_one = select(literal(1).label("one")).subquery("one")
_MOVE = (
    insert(REFS)
    .from_select(
        ["name", "alias", "turn", "digest", "previous", "actor", "reason", "at"],
        select(
            *(bindparam(name, type_=String) for name in ("name", "alias")),
            func.coalesce(_last.c.turn, 0) + 1,
            *(bindparam(name, type_=String) for name in ("digest", "expected", "actor", "reason", "at")),
        )
        .select_from(_one.outerjoin(_last, true()))
        .where(_last.c.digest.is_not_distinct_from(bindparam("expected", type_=String))),
    )
    .returning(*REFS.c)
)
_CURRENT = (
    select(REFS.c.digest)
    .where(REFS.c.name == bindparam("name"), REFS.c.alias == bindparam("alias"))
    .order_by(REFS.c.turn.desc())
    .limit(1)
)


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Values a column can hold: mappings as JSON text; text without what PostgreSQL or UTF-8 cannot store."""
    return {name: _column(value) for name, value in row.items()}


def _column(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    if not isinstance(value, Mapping):
        return value
    try:
        return json.dumps(dict(value), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"these facts are not JSON values: {error}", hint="NaN and objects cannot be kept"
        ) from error


def _run(row: RowMapping) -> RunRecord:
    known = {
        name: row[name] for name in ("id", "name", "status", "release", "error", "started_at", "ended_at")
    }
    return RunRecord(**known, recipe=json.loads(row["recipe"]), host=json.loads(row["host"]))


def _stage(row: RowMapping) -> StageRecord:
    known = {name: row[name] for name in ("stage", "key", "digest", "reused", "seconds", "at", "run_id")}
    return StageRecord(**known, facts=json.loads(row["facts"]))


def _release(row: RowMapping) -> ReleaseRecord:
    known = {name: row[name] for name in ("digest", "name", "run_id", "accepted", "at")}
    return ReleaseRecord(**known, facts=json.loads(row["facts"]))


def _move(row: RowMapping) -> RefMove:
    names = ("id", "name", "alias", "digest", "previous", "actor", "reason", "at")
    return RefMove(**{name: row[name] for name in names})
