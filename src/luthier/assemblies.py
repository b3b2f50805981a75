"""Files that come in parts: begun with their size, put together in the order the sender names, or given up.

Source: OpenAI's Uploads API (https://platform.openai.com/docs/api-reference/uploads). A part is a file of its
own below `home/uploads/` and counts in the tenant's room like any other; parts live as long as their upload
is pending, an hour at most. The finished file, its row and the end of the upload come in one transaction.
It does not know HTTP, nor what stands in the files.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.engine import Connection

from luthier.errors import StoreError
from luthier.incoming import Incoming, UploadRefused
from luthier.schema.uploads import ASSEMBLIES, ASSEMBLY_PARTS
from luthier.store import Store
from luthier.uploads import Label, NoUpload, Parts, Upload, Uploads, labelled

ID = re.compile(r"upload_[0-9a-f]{24}")
LIFE_S = 3600
PART_BYTES = 64 * 1024 * 1024
MOST_BYTES = 8 * 1024**3
MOST_PARTS = 2048
PENDING = 16  # uploads of one tenant at once

Check = Callable[[Label, Incoming], None]


@dataclass(frozen=True, slots=True)
class Assembly:
    """An upload that comes in parts. Times are whole seconds since 1970."""

    id: str
    tenant: str
    label: Label
    bytes: int
    created_at: int
    expires_at: int
    status: Literal["pending", "completed", "cancelled", "expired"]
    file_id: str | None = None


@dataclass(frozen=True, slots=True)
class Part:
    id: str
    assembly: str
    bytes: int
    created_at: int


class Assemblies:
    def __init__(self, store: Store, uploads: Uploads) -> None:
        self._store = store
        self.uploads = uploads

    def begin(self, tenant: str, label: Label, size: int) -> Assembly:
        """Promise a file of `size` bytes."""
        self.sweep()
        label = labelled(label)
        most = min(MOST_BYTES, self.uploads.limits.tenant_bytes)
        if not 0 < size <= most:
            raise UploadRefused(f"`bytes` must be between 1 and {most}", param="bytes")
        pending = and_(ASSEMBLIES.c.tenant == tenant, ASSEMBLIES.c.status == "pending")
        if self._store.rows(select(func.count().label("n")).where(pending))[0]["n"] >= PENDING:
            raise UploadRefused(f"{PENDING} uploads are pending already", code="too_many_uploads", http=429)
        now = int(time.time())
        row = {
            "id": f"upload_{secrets.token_hex(12)}", "tenant": tenant, "filename": label.filename,
            "purpose": label.purpose, "bytes": size, "keep_s": label.keep_s, "created_at": now,
            "expires_at": now + LIFE_S, "status": "pending",
        }  # fmt: skip
        with self._store.writing() as connection:
            connection.execute(insert(ASSEMBLIES), row)
        return self.get(tenant, str(row["id"]))

    def get(self, tenant: str, assembly_id: str) -> Assembly:
        """The tenant's upload of that id."""
        which = (ASSEMBLIES.c.id == assembly_id, ASSEMBLIES.c.tenant == tenant)
        rows = self._store.rows(select(ASSEMBLIES).where(*which)) if ID.fullmatch(assembly_id) else ()
        if not rows:
            raise NoUpload(f"no such Upload object: {assembly_id[:64]}")
        row = rows[0]
        over = row["status"] == "pending" and row["expires_at"] <= time.time()
        return Assembly(
            row["id"], row["tenant"], Label(row["filename"], row["purpose"], row["keep_s"]), row["bytes"],
            row["created_at"], row["expires_at"], "expired" if over else row["status"], row["file_id"],
        )  # fmt: skip

    @contextmanager
    def incoming(self, tenant: str, assembly_id: str) -> Iterator[Incoming]:
        """Room for one part; unless `add` is called with it, nothing of it stays."""
        _pending(self.get(tenant, assembly_id))
        with self.uploads.coming(tenant, PART_BYTES) as file:
            yield file

    def add(self, tenant: str, assembly_id: str, file: Incoming) -> Part:
        """The part is kept: bytes first, the row last, if all parts still fit the promised size."""
        assembly = _pending(self.get(tenant, assembly_id))
        if not file.bytes:
            raise UploadRefused("the part is empty", param="data")
        part = Part(f"part_{secrets.token_hex(12)}", assembly.id, file.bytes, int(time.time()))
        file.settle(self.uploads.folder / part.id)
        try:
            with self._store.writing() as connection:
                held, parts = self._so_far(connection, assembly.id)
                if held + part.bytes > assembly.bytes or parts >= MOST_PARTS:
                    what = f"the parts are more than the {assembly.bytes} bytes that were promised"
                    raise UploadRefused(what, param="data")
                row = {name: getattr(part, name) for name in ("id", "assembly", "bytes", "created_at")}
                connection.execute(insert(ASSEMBLY_PARTS), row)
        except BaseException:
            file.path.unlink(missing_ok=True)
            raise
        return part

    def complete(
        self, tenant: str, assembly_id: str, part_ids: Sequence[str], md5: str | None, check: Check
    ) -> tuple[Assembly, Upload]:
        """Put the parts together in that order. `check` may refuse what came of it: then it stays pending."""
        assembly = _pending(self.get(tenant, assembly_id))
        rows = self._store.rows(select(ASSEMBLY_PARTS).where(ASSEMBLY_PARTS.c.assembly == assembly.id))
        sizes = {row["id"]: row["bytes"] for row in rows}
        for part in part_ids:
            if part not in sizes:
                raise UploadRefused(f"no such part in this upload: {part[:64]}", param="part_ids")
        if len(set(part_ids)) < len(part_ids):
            raise UploadRefused("a part stands twice", param="part_ids")
        total = sum(sizes[part] for part in part_ids)
        if total != assembly.bytes:
            what = f"the parts hold {total} bytes, and {assembly.bytes} were promised"
            raise UploadRefused(what, param="part_ids")
        with self.uploads.coming(tenant, assembly.bytes, assembly.bytes) as file:
            found = self._join(part_ids, file)
            if md5 is not None and found != md5.lower():
                raise UploadRefused(f"the file's md5 is {found}", param="md5")
            check(assembly.label, file)

            def done(connection: Connection, upload: Upload) -> None:
                self._end(connection, assembly, "completed", upload.id)

            upload = self.uploads.keep(tenant, assembly.label, file, Parts(assembly.bytes, done))
        self.sweep()
        return self.get(tenant, assembly_id), upload

    def cancel(self, tenant: str, assembly_id: str) -> Assembly:
        """Give the upload up; its parts go."""
        assembly = _pending(self.get(tenant, assembly_id))
        with self._store.writing() as connection:
            self._end(connection, assembly, "cancelled", None)
        self.sweep()
        return self.get(tenant, assembly_id)

    def sweep(self) -> None:
        """Remove the parts of uploads that are done, given up or too old."""
        now = int(time.time())
        over = or_(ASSEMBLIES.c.status != "pending", ASSEMBLIES.c.expires_at <= now)
        gone = select(ASSEMBLIES.c.id).where(over)
        query = select(ASSEMBLY_PARTS.c.id).where(ASSEMBLY_PARTS.c.assembly.in_(gone))
        parts = [row["id"] for row in self._store.rows(query)]
        if parts:
            with self._store.writing() as connection:
                connection.execute(delete(ASSEMBLY_PARTS).where(ASSEMBLY_PARTS.c.id.in_(parts)))
        for part in parts:
            (self.uploads.folder / part).unlink(missing_ok=True)

    def _join(self, part_ids: Sequence[str], file: Incoming) -> str:
        md5 = hashlib.md5(usedforsecurity=False)  # the sender's own checksum, against accidents
        for part in part_ids:
            try:
                with open(self.uploads.folder / part, "rb") as source:
                    while piece := source.read(1 << 20):
                        md5.update(piece)
                        file.write(piece)
            except FileNotFoundError:
                raise UploadRefused(f"the part {part} is gone; begin again", param="part_ids") from None
            except OSError as error:
                raise StoreError(f"a part cannot be read: {error.strerror}") from error
        return md5.hexdigest()

    def _so_far(self, connection: Connection, assembly_id: str) -> tuple[int, int]:
        query = select(func.coalesce(func.sum(ASSEMBLY_PARTS.c.bytes), 0), func.count())
        held, parts = connection.execute(query.where(ASSEMBLY_PARTS.c.assembly == assembly_id)).one()
        return int(held), int(parts)

    def _end(self, connection: Connection, assembly: Assembly, status: str, file_id: str | None) -> None:
        """One end for each upload: the second of two callers finds it ended."""
        still = (ASSEMBLIES.c.id == assembly.id, ASSEMBLIES.c.status == "pending")
        values: dict[str, Any] = {"status": status, "file_id": file_id}
        if not connection.execute(update(ASSEMBLIES).where(*still).values(values)).rowcount:
            raise UploadRefused("this upload has ended already", param="upload_id")


def _pending(assembly: Assembly) -> Assembly:
    if assembly.status != "pending":
        raise UploadRefused(f"this upload is {assembly.status}", param="upload_id")
    return assembly
