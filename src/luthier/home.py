"""The home folder: where artefacts, downloads, locks, reports and the database live.

    artifacts/<digest>/   sealed folders, immutable
    work/<key>/           a stage at work: `out` is what it writes, `scratch` outlives a crash
    locks/                one file per stage key and per run; the kernel frees them when a process dies
    cache/                downloads and conversions; deleting it costs time, never truth
    runs/<run id>/        report.html and recipe.json, for people
    luthier.db            runs, stages, releases, refs, requests

It does not know what is in any of them.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import StoreError


@dataclass(frozen=True)
class Home:
    path: Path

    @classmethod
    def at(cls, path: str | Path | None = None) -> Home:
        """Open (and create) the home: the argument, else `$LUTHIER_HOME`, else `~/.luthier`."""
        chosen = (
            Path(path or os.environ.get("LUTHIER_HOME") or Path.home() / ".luthier").expanduser().absolute()
        )
        home = cls(chosen)
        try:
            chosen.mkdir(mode=0o700, parents=True, exist_ok=True)  # rows and requests are nobody else's
            for folder in (home.artifacts, home.work, home.locks, home.cache, home.runs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"the home folder cannot be used ({error.strerror})",
                where=str(chosen),
                hint="choose another with --home DIR or LUTHIER_HOME",
            ) from error
        return home

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def locks(self) -> Path:
        return self.path / "locks"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def runs(self) -> Path:
        return self.path / "runs"

    @property
    def database(self) -> Path | str:
        """Where the store is: `$LUTHIER_DATABASE` (an SQLAlchemy URL of PostgreSQL), else this folder."""
        return os.environ.get("LUTHIER_DATABASE") or self.path

    def artifact(self, digest: str) -> Path:
        return self.artifacts / digest

    @contextmanager
    def lock(self, name: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Hold `locks/<name>`; while another process has it, call `waiting(its pid)` once a second.

        The lock is the kernel's (flock), so a killed process never leaves one behind.
        """
        with open(self.locks / f"{name}.lock", "a+", encoding="utf-8") as file:
            while not _try_lock(file.fileno()):
                file.seek(0)
                waiting(file.read().strip() or "?")
                time.sleep(1.0)
            file.seek(0)
            file.truncate()
            file.write(str(os.getpid()))
            file.flush()
            try:
                yield
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)

    def is_locked(self, name: str) -> bool:
        """Whether a living process holds `locks/<name>`."""
        path = self.locks / f"{name}.lock"
        if not path.exists():
            return False
        with open(path, encoding="utf-8") as file:
            return not _try_lock(file.fileno())


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
