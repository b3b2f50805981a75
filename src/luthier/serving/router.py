"""Which release answers: `NAME` (its production), `NAME@ALIAS`, or `NAME@DIGEST` (12 or more hex digits).

Nothing about aliases is remembered between requests: each resolution is one indexed read, so a promote or
rollback by another process holds from the next request on. A release is handed out only if its sealed
files are whole (sizes each time, every byte when this process first sees it) and if its adapter was
trained on the very base that will be loaded under it.

It does not know HTTP, tokens or models in memory. An alias that looks like a digest is never found.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import artifacts
from luthier.errors import GateRefused, NotFound, StoreError
from luthier.home import Home
from luthier.plugins import unknown
from luthier.store import ReleaseRecord, Store

DEFAULT_ALIAS = "production"
SPELLING = re.compile(r"(?P<name>[a-z][a-z0-9-]{0,47})(?:@(?P<which>[a-z0-9][a-z0-9-]{0,63}))?")
DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class Target:
    """A release, verified: the base to load and the adapter to lay over it, each by its content."""

    release_digest: str
    name: str
    base_digest: str
    base_dir: Path
    adapter_digest: str
    adapter_dir: Path


@dataclass(frozen=True, slots=True)
class Listed:
    """A name under which a model can be asked for, and the release that would answer now."""

    model: str
    release: ReleaseRecord


class Router:
    def __init__(self, store: Store, home: Home) -> None:
        self._store = store
        self._home = home
        self._whole: set[str] = set()  # artefacts whose every byte was checked by this process
        self._checking = threading.Lock()

    def resolve(self, model: str) -> Target:
        """The release that `model` names now; raises `NotFound` with the nearest name."""
        spelt = SPELLING.fullmatch(model)
        if spelt is None:
            raise self._not_found(model)
        name, which = spelt["name"], spelt["which"] or DEFAULT_ALIAS
        if DIGEST.fullmatch(which):
            record = self._release(name, which, model)
            if not record.accepted:
                raise GateRefused(f"{name}@{which[:12]} was refused by its gates and is not served")
            return self.target(record.digest, name)
        digest = self._store.resolve(name, which)
        if digest is None:
            raise self._not_found(model)
        return self.target(digest, name)

    def target(self, release_digest: str, name: str) -> Target:
        """Verify one release and the base it stands on."""
        folder = self._verified(release_digest)
        release = _read(folder / "release.json")
        model = self._verified(str(release["model"]))
        base = _read(model / "base.json")
        if release["base"] != base["digest"]:
            raise StoreError(
                f"release {release_digest[:12]} was made on base {str(release['base'])[:12]}, "
                f"but its model artefact holds base {str(base['digest'])[:12]}",
                where=str(folder),
            )
        adapter = folder / "adapter"
        trained_on = _read(adapter / "adapter_config.json").get("base_model_name_or_path")
        if trained_on != f"luthier-base:{base['digest'][:12]}":
            raise StoreError(
                f"the adapter of release {release_digest[:12]} was trained on {trained_on!r}, "
                f"not on base {base['digest'][:12]}",
                where=str(adapter),
                hint="an adapter answers only over the base it was trained on",
            )
        return Target(release_digest, name, base["digest"], model / "base", _adapter_digest(folder), adapter)

    def listed(self) -> list[Listed]:
        """Every `NAME@ALIAS`, then every accepted release as `NAME@DIGEST`."""
        found: list[Listed] = []
        for name in self._store.names():
            records = {record.digest: record for record in self._store.releases(name)}
            for alias, digest in sorted(self._store.aliases(name).items()):
                if digest in records:
                    found.append(Listed(f"{name}@{alias}", records[digest]))
            found += [Listed(f"{name}@{r.digest}", r) for r in records.values() if r.accepted]
        return found

    def in_production(self) -> list[str]:
        """The models worth loading before anyone asks."""
        names = self._store.names()
        return [f"{name}@{DEFAULT_ALIAS}" for name in names if self._store.resolve(name, DEFAULT_ALIAS)]

    def _release(self, name: str, prefix: str, model: str) -> ReleaseRecord:
        try:
            return self._store.release(name, prefix)
        except NotFound:
            raise self._not_found(model) from None

    def _not_found(self, model: str) -> NotFound:
        aliased = [
            f"{name}@{alias}" for name in self._store.names() for alias in sorted(self._store.aliases(name))
        ]
        if not aliased:
            return NotFound(
                f"unknown model {model!r}: nothing is released here yet", hint="luthier run RECIPE"
            )
        return NotFound(unknown("model", model, aliased), hint="write NAME, NAME@ALIAS or NAME@DIGEST")

    def _verified(self, digest: str) -> Path:
        folder = self._home.artifact(digest)
        if not folder.is_dir():
            raise StoreError(
                f"artefact {digest[:12]} is gone", where=str(folder), hint="run its recipe again"
            )
        if digest in self._whole:
            self._check(folder, digest, deep=False)
            return folder
        with self._checking:  # one reader of many bytes at a time, and the others find it done
            self._check(folder, digest, deep=digest not in self._whole)
            self._whole.add(digest)
        return folder

    @staticmethod
    def _check(folder: Path, digest: str, *, deep: bool) -> None:
        if artifacts.verify(folder, deep=deep) != digest:
            raise StoreError(f"artefact {digest[:12]} is not what its name says", where=str(folder))


def _adapter_digest(release: Path) -> str:
    """What the adapter is, by its files: releases that share one share its place in memory."""
    files = _read(release / "manifest.json")["files"]
    return artifacts.digest_of(
        {path: entry["sha256"] for path, entry in files.items() if path.startswith("adapter/")}
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise StoreError(f"{path.name} is not an object", where=str(path))
    return value
