"""A tenant's files: rows in the store, bytes below `home/uploads/`, each under the file's own id.

Source: OpenAI's Files API (https://platform.openai.com/docs/api-reference/files). Bytes stream to a temporary
file while they are hashed; then fsync, rename, fsync of the folder, and the row comes last. So a file that
has a row is whole, and what a crash leaves has none: it counts for nobody and `sweep` removes it. A writer
holds a lock on its file (the kernel's, freed when the process dies), so a sweep never takes what another
process is still writing.

A path is made of an id of ours, never of a name from outside: the file name is a label for people. Deleting
removes the bytes and keeps the row. It does not know HTTP, nor what stands in the files.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sqlalchemy import and_, func, insert, or_, select, union_all, update
from sqlalchemy.engine import Connection, RowMapping

from luthier.errors import NotFound, StoreError
from luthier.home import Home
from luthier.incoming import TEMPORARY, Incoming, UploadRefused, disk, try_lock
from luthier.schema.jobs import JOBS
from luthier.schema.uploads import ASSEMBLIES, ASSEMBLY_PARTS, UPLOADS
from luthier.store import Store

PURPOSES = ("fine-tune", "fine-tune-results", "batch")
KEEP_S = (3600, 2_592_000)  # the shortest and longest `expires_after` that OpenAI takes
BATCH_KEEP_S = 2_592_000  # its default for batch files
ID = re.compile(r"file-[0-9a-f]{24}")
PART = re.compile(r"part_[0-9a-f]{24}")  # of a file that comes in parts (`assemblies`)
UNDER_WAY = ("validating_files", "queued", "running", "paused")  # jobs in these states read their files
LABEL_LETTERS = 255
COLUMNS = ("id", "tenant", "filename", "purpose", "bytes", "sha256", "created_at", "expires_at")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one file, of one tenant, and how many files may be on their way in at once."""

    file_bytes: int = 512 * 1024 * 1024
    tenant_bytes: int = 64 * 1024**3
    tenant_files: int = 10_000
    incoming: int = 8


DEFAULTS = Limits()


@dataclass(frozen=True, slots=True)
class Upload:
    """One file. Times are whole seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None = None
    status: Literal["processed"] = "processed"


@dataclass(frozen=True, slots=True)
class Label:
    """What the sender says of a file; `keep_s` after its creation it goes (None: never)."""

    filename: str
    purpose: str
    keep_s: int | None = None


class NoUpload(NotFound):
    """No such file, or not this tenant's: the two are answered alike."""

    code = None
    param = "id"


def labelled(label: Label) -> Label:
    """The label made harmless, or `UploadRefused`. A name keeps its last step, without control letters."""
    if label.purpose not in PURPOSES:
        known = ", ".join(PURPOSES)
        raise UploadRefused(f"purpose {label.purpose[:64]!r} is not one of: {known}", param="purpose")
    keep_s = label.keep_s
    if keep_s is not None and not KEEP_S[0] <= keep_s <= KEEP_S[1]:
        raise UploadRefused(
            f"`expires_after.seconds` must be between {KEEP_S[0]} and {KEEP_S[1]}", param="expires_after"
        )
    if keep_s is None and label.purpose == "batch":
        keep_s = BATCH_KEEP_S
    name = unicodedata.normalize("NFC", label.filename.encode("utf-8", "replace").decode("utf-8"))
    name = "".join(sign for sign in re.split(r"[/\\]", name)[-1] if sign.isprintable()).strip()
    return Label(name[:LABEL_LETTERS] if name.strip(".") else "file", label.purpose, keep_s)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a file was put together from: bytes that count already, and what to write when it is kept."""

    bytes: int
    done: Callable[[Connection, Upload], None]


class Uploads:
    def __init__(self, store: Store, home: Home, limits: Limits = DEFAULTS) -> None:
        self.limits = limits
        self.home = home
        self.folder = home.path / "uploads"
        self._store = store
        self._coming: Counter[str] = Counter()  # files on their way into this process, by tenant
        self._counting = threading.Lock()
        with disk():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def incoming(self, tenant: str) -> Iterator[Incoming]:
        """Room for one file; unless `keep` is called with it, nothing of it stays."""
        self.retire()
        with self.coming(tenant, self.limits.file_bytes) as file:
            yield file

    @contextmanager
    def coming(self, tenant: str, most: int, counted: int = 0) -> Iterator[Incoming]:
        """Room for at most `most` bytes, of which the tenant's room holds `counted` already."""
        held, count = self._held(tenant)
        room = min(most, self.limits.tenant_bytes - held + counted)
        if count >= self.limits.tenant_files or room <= 0:
            raise self._no_room(held, count)
        with self._place(tenant):
            with disk():
                file = Incoming(self.folder, room)
            try:
                yield file
            finally:
                file.close(keep=not file.path.name.startswith(TEMPORARY))

    @contextmanager
    def _place(self, tenant: str) -> Iterator[None]:
        """One of the few places for files that come at the same time."""
        with self._counting:
            if self._coming[tenant] >= self.limits.incoming:
                raise UploadRefused(
                    f"{self.limits.incoming} files are on their way already",
                    code="too_many_uploads",
                    http=429,
                )
            self._coming[tenant] += 1
        try:
            yield
        finally:
            with self._counting:
                self._coming[tenant] -= 1

    def keep(self, tenant: str, label: Label, file: Incoming, parts: Parts | None = None) -> Upload:
        """The file becomes the tenant's: bytes on disk first, the row last."""
        label = labelled(label)
        if not file.bytes:
            raise UploadRefused("the file is empty", param="file")
        upload_id = f"file-{secrets.token_hex(12)}"
        sha256 = file.settle(self.folder / upload_id)
        created_at = int(time.time())
        expires_at = None if label.keep_s is None else created_at + label.keep_s
        upload = Upload(
            upload_id, tenant, label.filename, label.purpose, file.bytes, sha256, created_at, expires_at
        )
        try:
            with self._store.writing() as connection:
                self._admit(connection, upload, parts.bytes if parts else 0)
                if parts is not None:
                    parts.done(connection, upload)
        except BaseException:
            file.path.unlink(missing_ok=True)
            raise
        return upload

    def put(self, tenant: str, label: Label, source: BinaryIO) -> Upload:
        """A whole file from a stream: what the server's own parts use (result files, parts put together)."""
        with self.incoming(tenant) as file:
            while piece := source.read(1 << 20):
                file.write(piece)
            return self.keep(tenant, label, file)

    def get(self, tenant: str | None, upload_id: str) -> Upload:
        """The tenant's file (None: anyone's), if it is neither deleted nor expired."""
        found = (
            self._store.rows(select(UPLOADS).where(UPLOADS.c.id == upload_id, *_seen_by(tenant), _here()))
            if ID.fullmatch(upload_id)
            else ()
        )
        if not found:
            raise _unknown(upload_id)
        return _upload(found[0])

    def list(
        self, tenant: str, *, after: str | None = None, limit: int = 10_000, order: str = "desc",
        purpose: str | None = None,
    ) -> tuple[list[Upload], bool]:  # fmt: skip
        """A page of the tenant's files and whether more follow; `after` is the last id of the page before."""
        query = select(UPLOADS).where(UPLOADS.c.tenant == tenant, _here())
        if purpose is not None:
            query = query.where(UPLOADS.c.purpose == purpose)
        ascending = order == "asc"
        if after is not None:
            at = self._turn(tenant, after)
            query = query.where(UPLOADS.c.seq > at if ascending else UPLOADS.c.seq < at)
        query = query.order_by(UPLOADS.c.seq if ascending else UPLOADS.c.seq.desc()).limit(limit + 1)
        rows = self._store.rows(query)
        return [_upload(row) for row in rows[:limit]], len(rows) > limit

    def path(self, upload: Upload) -> Path:
        """Where the bytes lie. They may go at any time: open them first, then trust them."""
        if not ID.fullmatch(upload.id):
            raise _unknown(upload.id)
        return self.folder / upload.id

    def open(self, upload: Upload) -> BinaryIO:
        """The bytes, readable to their end even if the file is deleted meanwhile."""
        try:
            return os.fdopen(os.open(self.path(upload), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
        except FileNotFoundError:
            raise _unknown(upload.id) from None
        except OSError as error:
            raise StoreError(f"cannot be read: {error.strerror}", where=str(self.path(upload))) from error

    def delete(self, tenant: str | None, upload_id: str) -> Upload:
        """The row stays and says when; the bytes go. A file that an unfinished job reads is kept."""
        upload = self.get(tenant, upload_id)
        with self._store.writing() as connection:
            reads = or_(JOBS.c.training_file == upload_id, JOBS.c.validation_file == upload_id)
            job = connection.execute(select(JOBS.c.id).where(reads, JOBS.c.status.in_(UNDER_WAY))).scalar()
            if job is not None:
                raise UploadRefused(
                    f"the file is read by job {job}; cancel it first", param="id", code="file_in_use"
                )
            _mark_gone(connection, UPLOADS.c.id == upload_id)
        self.path(upload).unlink(missing_ok=True)
        return upload

    def retire(self) -> None:
        """Files whose time is over go as deleted ones do."""
        over = and_(UPLOADS.c.expires_at <= int(time.time()), UPLOADS.c.deleted_at.is_(None))
        if not self._store.rows(select(UPLOADS.c.id).where(over).limit(1)):
            return
        with self._store.writing() as connection:
            gone = [row["id"] for row in connection.execute(select(UPLOADS.c.id).where(over)).mappings()]
            _mark_gone(connection, UPLOADS.c.id.in_(gone))
        for upload_id in gone:
            (self.folder / upload_id).unlink(missing_ok=True)

    def sweep(self) -> int:
        """Remove what a crash left: bytes that nobody writes and no row owns. Returns how many."""
        self.retire()
        return sum(self._abandoned(path) for path in sorted(self.folder.iterdir()))

    def _abandoned(self, path: Path) -> bool:
        temporary = path.name.startswith(TEMPORARY)
        if not (temporary or ID.fullmatch(path.name) or PART.fullmatch(path.name)) or path.is_symlink():
            return False
        with suppress(FileNotFoundError), open(path, "rb") as file:
            if not try_lock(file):
                return False
            owned = and_(UPLOADS.c.id == path.name, UPLOADS.c.deleted_at.is_(None))
            parts = select(ASSEMBLY_PARTS.c.id).where(ASSEMBLY_PARTS.c.id == path.name)
            if temporary or not self._store.rows(union_all(select(UPLOADS.c.id).where(owned), parts)):
                path.unlink(missing_ok=True)
                return True
        return False

    def _admit(self, connection: Connection, upload: Upload, counted: int) -> None:
        """The row, unless the tenant's room was taken by another upload meanwhile."""
        if connection.dialect.name == "postgresql":  # SQLite has one writer at a time; here tenants queue
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(upload.tenant))))
        held, count = _sum(connection.execute(_held_by(upload.tenant)).mappings().one())
        if held - counted + upload.bytes > self.limits.tenant_bytes or count >= self.limits.tenant_files:
            raise self._no_room(held, count)
        row = {name: getattr(upload, name) for name in COLUMNS}
        connection.execute(insert(UPLOADS), row)

    def _turn(self, tenant: str, upload_id: str) -> int:
        """Where a file stands in the order of the tenant's files; a deleted one keeps its place."""
        if ID.fullmatch(upload_id):
            which = (UPLOADS.c.id == upload_id, UPLOADS.c.tenant == tenant)
            for row in self._store.rows(select(UPLOADS.c.seq).where(*which)):
                return int(row["seq"])
        raise _unknown(upload_id)

    def room(self, tenant: str) -> int:
        """How many more bytes the tenant may keep here."""
        return max(0, self.limits.tenant_bytes - self._held(tenant)[0])

    def _held(self, tenant: str) -> tuple[int, int]:
        return _sum(self._store.rows(_held_by(tenant))[0])

    def _no_room(self, held: int, count: int) -> UploadRefused:
        return UploadRefused(
            f"your files hold {held} of {self.limits.tenant_bytes} bytes and are {count} of "
            f"{self.limits.tenant_files}; delete some first",
            code="storage_quota_exceeded",
            http=403,
        )


def _unknown(upload_id: str) -> NoUpload:
    return NoUpload(f"no such File object: {upload_id[:64]}")


def _held_by(tenant: str) -> Any:
    """The bytes of the tenant's files and of parts that wait to be put together, and the number of files."""
    parts = (
        select(func.coalesce(func.sum(ASSEMBLY_PARTS.c.bytes), 0))
        .join(ASSEMBLIES, ASSEMBLIES.c.id == ASSEMBLY_PARTS.c.assembly)
        .where(ASSEMBLIES.c.tenant == tenant)
        .scalar_subquery()
    )
    total = (func.coalesce(func.sum(UPLOADS.c.bytes), 0) + parts).label("held")
    return select(total, func.count().label("files")).where(UPLOADS.c.tenant == tenant, _here())


def _sum(row: RowMapping) -> tuple[int, int]:
    return int(row["held"]), int(row["files"])


def _here() -> Any:
    """Neither deleted nor expired."""
    still = or_(UPLOADS.c.expires_at.is_(None), UPLOADS.c.expires_at > int(time.time()))
    return and_(UPLOADS.c.deleted_at.is_(None), still)


def _seen_by(tenant: str | None) -> tuple[Any, ...]:
    return () if tenant is None else (UPLOADS.c.tenant == tenant,)


def _mark_gone(connection: Connection, which: Any) -> None:
    connection.execute(
        update(UPLOADS).where(which, UPLOADS.c.deleted_at.is_(None)).values(deleted_at=int(time.time()))
    )


def _upload(row: RowMapping) -> Upload:
    return Upload(**{name: row[name] for name in COLUMNS})
