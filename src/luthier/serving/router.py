"""Which model answers: `NAME` (its production), `NAME@ALIAS`, `NAME@DIGEST` (12 hex digits or more), a base.

Nothing about aliases is remembered between requests: each resolution is one indexed read, so a promote or
rollback by another process holds from the next request on. A release is handed out only if its sealed
files are whole (sizes each time, every byte when this process first sees it) and if its adapter was
trained on the very base that will be loaded under it. A base's name is answered by the base alone. A name
that its caller may not see is not found, in the same words as one that nobody has.

It does not know HTTP, tokens or models in memory. An alias that looks like a digest is never found.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from luthier import artifacts, bases, owners, tuned
from luthier.bases import Entry
from luthier.errors import GateRefused, NotFound, StoreError
from luthier.home import Home
from luthier.plugins import unknown
from luthier.store import ReleaseRecord, Store
from luthier.tuned import Tuned

DEFAULT_ALIAS = "production"
SPELLING = re.compile(r"(?P<name>[a-z][a-z0-9-]{0,47})(?:@(?P<which>[a-z0-9][a-z0-9-]{0,63}))?")
DIGEST = re.compile(r"[0-9a-f]{12,64}")


@dataclass(frozen=True, slots=True)
class Target:
    """A release, verified: the base to load and the adapter to lay over it, each by its content.

    A bare base has no adapter, and its `release_digest` is the base's own. `int8`: the release was judged,
    and is to be answered, with the base's weights rounded to 8 bits.
    """

    release_digest: str
    name: str
    base_digest: str
    base_dir: Path
    adapter_digest: str | None
    adapter_dir: Path | None
    int8: bool = False

    @property
    def loaded(self) -> str:
        """What has to be in memory to answer: releases that share it share one copy."""
        return f"{self.base_digest}:int8" if self.int8 else self.base_digest


@dataclass(frozen=True, slots=True)
class Listed:
    """A name under which a model can be asked for, and the release (or base) that would answer now."""

    model: str
    digest: str
    created_at: int
    owner: str


class Router:
    def __init__(self, store: Store, home: Home) -> None:
        self._store = store
        self._home = home
        self._whole: set[str] = set()  # artefacts whose every byte was checked by this process
        self._checking = threading.Lock()

    def resolve(self, model: str, tenant: str | None = None) -> Target:
        """What `model` names now for `tenant` (None: sees all); raises `NotFound` with the nearest name."""
        if (base := bases.get(self._store, model)) is not None:
            return self._bare(base)
        if model.startswith(tuned.PREFIX):
            return self._tuned(self._find(model, tenant))
        record = self._record(model, tenant)
        return self.target(record.digest, record.name)

    def _find(self, model: str, tenant: str | None) -> Tuned:
        try:
            return tuned.find(self._store, model, tenant)
        except NotFound:
            raise self._not_found(model, tenant) from None

    def _tuned(self, found: Tuned) -> Target:
        """A job's release, or the adapter that the job kept of one of its steps."""
        if found.artefact is None or found.step is None:
            return self.target(found.release, found.name)
        place = f"checkpoints/step-{found.step}/adapter"
        return self._over(found.release, found.name, found.artefact, place)

    def _record(self, model: str, tenant: str | None) -> ReleaseRecord:
        """The release behind NAME, NAME@ALIAS or NAME@DIGEST."""
        spelt = SPELLING.fullmatch(model)
        if spelt is None or not self._visible(spelt["name"], tenant):
            raise self._not_found(model, tenant)
        name, which = spelt["name"], spelt["which"] or DEFAULT_ALIAS
        digest = which if DIGEST.fullmatch(which) else self._store.resolve(name, which)
        if digest is None:
            raise self._not_found(model, tenant)
        record = self._release(name, digest, model, tenant)
        if digest == which and not record.accepted:
            raise GateRefused(f"{name}@{which[:12]} was refused by its gates and is not served")
        return record

    def _visible(self, name: str, tenant: str | None) -> bool:
        """A tuned model that was deleted is gone by its job's name, too, for every client."""
        given_up = tenant is not None and name.startswith(owners.JOB) and not tuned.has(self._store, name)
        return not given_up and owners.visible(self._store, name, tenant)

    def target(self, release_digest: str, name: str) -> Target:
        """Verify one release and the base it stands on."""
        return self._over(release_digest, name, release_digest, "adapter")

    def _over(self, release_digest: str, name: str, holder: str, place: str) -> Target:
        """The adapter at `place` in the artefact `holder`, over the base of a release."""
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
        held = self._verified(holder)
        trained_on = _read(held / place / "adapter_config.json").get("base_model_name_or_path")
        if trained_on != f"luthier-base:{base['digest'][:12]}":
            raise StoreError(
                f"the adapter of release {holder[:12]} was trained on {trained_on!r}, "
                f"not on base {base['digest'][:12]}",
                where=str(held / place),
                hint="an adapter answers only over the base it was trained on",
            )
        digest = _adapter_digest(held, f"{place}/")
        int8 = release.get("weights") == "int8"
        return Target(holder, name, base["digest"], model / "base", digest, held / place, int8)

    def _bare(self, base: Entry) -> Target:
        """A base as it came, without an adapter."""
        folder = self._verified(base.model)
        if _read(folder / "base.json")["digest"] != base.base:
            raise StoreError(
                f"artefact {base.model[:12]} does not hold base {base.base[:12]}", where=str(folder)
            )
        return Target(base.base, base.name, base.base, folder / "base", None, None)

    def listed(self, tenant: str | None = None) -> list[Listed]:
        """What `tenant` may ask for: bases, tuned models, every `NAME@ALIAS`, accepted releases by digest."""
        found = [
            Listed(base.name, base.base, base.created_at, "luthier") for base in bases.listed(self._store)
        ]
        found += [_named(one) for one in tuned.listed(self._store, tenant)]
        for name in self._names(tenant):
            if name.startswith(owners.JOB):  # a job's release goes by its `ft:` name
                continue
            records = {record.digest: record for record in self._store.releases(name)}
            for alias, digest in sorted(self._store.aliases(name).items()):
                if digest in records:
                    found.append(self._entry(f"{name}@{alias}", records[digest]))
            found += [self._entry(f"{name}@{r.digest}", r) for r in records.values() if r.accepted]
        return found

    def entry(self, model: str, tenant: str | None = None) -> Listed:
        """One name that `tenant` may ask for, as `listed` has it; a short spelling is found too."""
        if (base := bases.get(self._store, model)) is not None:
            return Listed(base.name, base.base, base.created_at, "luthier")
        if model.startswith(tuned.PREFIX):
            return _named(self._find(model, tenant))
        return self._entry(model, self._record(model, tenant))

    def withdraw(self, model: str, tenant: str | None = None) -> None:
        """Give up a tuned model's name for good; `NotFound` for what is not a tuned model of `tenant`'s."""
        self._find(model, tenant)
        tuned.delete(self._store, model, tenant)

    def in_production(self) -> list[str]:
        """The models worth loading before anyone asks: bases, and what stands in production."""
        names = self._store.names()
        named = [f"{name}@{DEFAULT_ALIAS}" for name in names if self._store.resolve(name, DEFAULT_ALIAS)]
        return [base.name for base in bases.listed(self._store)] + named

    def _entry(self, model: str, record: ReleaseRecord) -> Listed:
        created_at = int(datetime.fromisoformat(record.at).timestamp())
        return Listed(model, record.digest, created_at, owners.owner(self._store, record.name))

    def _names(self, tenant: str | None) -> list[str]:
        return [name for name in self._store.names() if owners.visible(self._store, name, tenant)]

    def _release(self, name: str, prefix: str, model: str, tenant: str | None) -> ReleaseRecord:
        try:
            return self._store.release(name, prefix)
        except NotFound:
            raise self._not_found(model, tenant) from None

    def _not_found(self, model: str, tenant: str | None) -> NotFound:
        known = [base.name for base in bases.listed(self._store)]
        known += [one.id for one in tuned.listed(self._store, tenant)]
        names = [name for name in self._names(tenant) if not name.startswith(owners.JOB)]
        known += [f"{name}@{alias}" for name in names for alias in sorted(self._store.aliases(name))]
        if not known:
            return NotFound(
                f"unknown model {model!r}: nothing is released here yet", hint="luthier run RECIPE"
            )
        return NotFound(unknown("model", model, known), hint="write NAME, NAME@ALIAS or NAME@DIGEST")

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


def _named(found: Tuned) -> Listed:
    digest = found.artefact if found.artefact is not None else found.release
    return Listed(found.id, digest, found.created_at, found.tenant)


def _adapter_digest(folder: Path, place: str) -> str:
    """What the adapter is, by its files: releases that share one share its place in memory."""
    files = _read(folder / "manifest.json")["files"]
    return artifacts.digest_of(
        {
            f"adapter/{path.removeprefix(place)}": entry["sha256"]
            for path, entry in files.items()
            if path.startswith(place)
        }
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:  # its own words would name the path
        raise StoreError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise StoreError(f"{path.name} is not an object", where=str(path))
    return value
