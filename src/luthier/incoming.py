"""A file on its way in: hashed while it is written, bounded, locked by its writer, named when it is whole.

Order as git and SQLite write: temporary file, fsync, rename, fsync of the folder. The lock is the kernel's
(flock on the open file), so it goes with its process: what can be locked by another is nobody's any more.
It does not know tenants, rows or what the bytes are.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from luthier.errors import DataError, StoreError

TEMPORARY = ".incoming-"


class UploadRefused(DataError):
    """This file is not taken, or not given up; `param` and `code` as OpenAI's errors have them."""

    http_code = 400

    def __init__(self, what: str, *, param: str | None = None, code: str | None = None, http: int = 400):
        super().__init__(what)
        self.param, self.code, self.http_code = param, code, http


class DiskFull(StoreError):
    """The bytes found no room; nothing was kept."""

    http_code = 507
    code = "disk_full"
    param = None


class Incoming:
    """A file on its way in: bytes are hashed and written as they come, at most `room` of them."""

    def __init__(self, folder: Path, room: int) -> None:
        self.path, self._file = _locked(folder)
        self._room = room
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.bytes += len(data)
        if self.bytes > self._room:
            raise UploadRefused(
                f"the file is larger than {self._room} bytes", param="file", code="file_too_large", http=413
            )
        self._sha256.update(data)
        with disk():
            self._file.write(data)

    def so_far(self) -> Path:
        """Where what has come can be read."""
        with disk():
            self._file.flush()
        return self.path

    def settle(self, path: Path) -> str:
        """On disk under its own name, still locked; returns its SHA-256."""
        with disk():
            self._file.flush()
            os.fsync(self._file.fileno())
            os.rename(self.path, path)
            self.path = path
            _fsync(path.parent)
        return self._sha256.hexdigest()

    def close(self, *, keep: bool) -> None:
        if not keep:
            self.path.unlink(missing_ok=True)
        with suppress(OSError):  # what was buffered for a full disk cannot be written at closing either
            self._file.close()


def _locked(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file that this process holds the lock of; a sweep between its making and its lock is noticed."""
    while True:
        path = folder / f"{TEMPORARY}{secrets.token_hex(12)}"
        file = open(path, "xb")  # noqa: SIM115 - closed by `Incoming.close`
        os.fchmod(file.fileno(), 0o600)
        if try_lock(file) and path.exists():
            return path, file
        file.close()


def try_lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _fsync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk() -> Iterator[None]:
    """The disk's refusal as an error of ours; a full one has its own status."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull("this server's disk is full; nothing of this file was kept") from error
        raise StoreError(f"the file cannot be stored: {error.strerror or error}") from error
