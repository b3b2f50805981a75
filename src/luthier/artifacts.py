"""Artefacts: folders named by what is in them. Canonical JSON, stage keys, durable writes, manifests, checks.

Sources: RFC 8785 in spirit (sorted keys, no white space, UTF-8; numbers are written as Python writes them),
FIPS 180-4 (SHA-256), and the write order of git and SQLite: temp file, fsync, rename, fsync of the folder.

A sealed folder holds `manifest.json`: the SHA-256 and size of every file, and one digest over those files
that lie outside `observed/` (clock and host readings, which are checked but are not part of the name).
The digest does not know the folder's name, times, owners or empty folders. A manifest proves that a
folder is whole, not who made it: a caller who expects a digest must compare it with what `verify` returns.
This module does not know stages, runs or what any file means.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from luthier.errors import StoreError

FORMAT = 1
MANIFEST = "manifest.json"
OBSERVED = "observed/"
_TEMP = ".luthier-"  # a write that was killed leaves a file of this prefix; sealing removes it

_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, then run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space, then run the same command again",
    errno.EFBIG: "the file-size limit is reached: raise it (`ulimit -f`), then run the same command again",
    errno.EIO: "the disk reports a hardware error: check it before you trust this folder",
    errno.EROFS: "the file system is read-only: choose another folder with --home",
    errno.EACCES: "this user may not write here: check the owner and mode of the folder",
    errno.EPERM: "this user may not write here: check the owner and mode of the folder",
    errno.EXDEV: "both folders must lie on one file system",
}

Entry = dict[str, Any]  # {"sha256": str, "bytes": int}


def canonical(obj: object) -> bytes:
    """The one way to write a JSON value: equal values give equal bytes. NaN and infinity are refused."""
    try:
        text = json.dumps(obj, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8")
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"this value has no canonical JSON: {error}",
            hint="use text, whole numbers, finite floats, booleans, None, lists and dicts with text keys",
        ) from error


def digest_of(obj: object) -> str:
    """SHA-256 of the canonical JSON, as 64 hex digits."""
    return hashlib.sha256(canonical(obj)).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    with _named(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_key(
    stage: str, section: Mapping[str, Any], versions: Mapping[str, int], inputs: Mapping[str, str], seed: int
) -> str:
    """What was asked of a stage, as one digest: equal keys may share one artefact."""
    asked = {"stage": stage, "section": section, "versions": versions, "inputs": inputs, "seed": seed}
    return digest_of(
        {name: dict(part) if isinstance(part, Mapping) else part for name, part in asked.items()}
    )


# ---- one file, written whole or not at all ----------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`; after a crash at any moment there is the old file or the new one."""
    _replace(path, (data,))


def write_chunks(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """As `write_bytes`, for what need not be in memory in one piece."""
    _replace(path, chunks)


def write_json(path: Path, obj: object) -> None:
    """One JSON value for people and machines: sorted, indented, the same bytes for the same value."""
    tidy = json.loads(canonical(obj))
    write_bytes(path, (json.dumps(tidy, sort_keys=True, ensure_ascii=False, indent=2) + "\n").encode("utf-8"))


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """One canonical JSON value a line; `rows` may be a generator, at most one row is held at a time."""
    _replace(path, (canonical(row) + b"\n" for row in rows))


def read_json(path: Path) -> Any:
    """The value in a JSON file; a missing or damaged file is a `StoreError` naming it."""
    with _named(path, "read"):
        return _parse(Path(path).read_bytes(), str(path))


def read_jsonl(path: Path) -> list[Any]:
    """The values of a JSONL file, in order; a damaged line is a `StoreError` naming `file:line`."""
    with _named(path, "read"):
        lines = Path(path).read_bytes().split(b"\n")
    return [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise StoreError(
            f"this is not valid JSON: {error}", where=where, hint="the file is damaged"
        ) from error


def _replace(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    path = Path(path)
    temp = path.with_name(f"{_TEMP}{path.name[:64]}-{secrets.token_hex(6)}")
    with _named(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temp, "xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temp, path)
        except BaseException:
            with suppress(OSError):
                temp.unlink(missing_ok=True)
            raise
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _named(path: Path | str, verb: str) -> Iterator[None]:
    """Turn the operating system's refusal into an error with a place and a next step."""
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0)
        raise StoreError(
            f"cannot {verb} it: {error.strerror or error}", where=str(path), hint=hint
        ) from error


# ---- a folder, sealed ----------------------------------------------------------------------------------


def seal(folder: Path) -> str:
    """Hash and fsync every file, write the manifest last, and return the digest."""
    folder = Path(folder)
    with _named(folder, "seal"):
        for path in folder.rglob(f"{_TEMP}*"):
            path.unlink()
        paths = _files(folder)
        entries = {name: _entry(path) for name, path in paths.items()}
        for path in paths.values():
            _fsync(path)
        for inner in sorted(path for path in folder.rglob("*") if path.is_dir()):
            _fsync(inner)
        manifest = _manifest(entries)
        write_bytes(folder / MANIFEST, canonical(manifest) + b"\n")
        _fsync(folder.parent)
    return str(manifest["digest"])


def verify(folder: Path, deep: bool = True) -> str:
    """Return the digest if the folder is whole; else name every damaged, missing and extra file.

    `deep=False` compares names and sizes only: it sees a torn folder, not a flipped bit.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    expected: dict[str, Entry] = manifest["files"] | manifest["observed"]
    paths = _files(folder)
    troubles = [f"missing {name}" for name in expected if name not in paths]
    troubles += [f"extra {name}" for name in paths if name not in expected]
    for name in sorted(expected.keys() & paths.keys()):
        with _named(paths[name], "read"):
            size = paths[name].stat().st_size
        if size != expected[name]["bytes"]:
            troubles.append(f"damaged {name} ({size} bytes instead of {expected[name]['bytes']})")
        elif deep and file_digest(paths[name]) != expected[name]["sha256"]:
            troubles.append(f"damaged {name} (its SHA-256 changed)")
    if troubles:
        shown = "; ".join(troubles[:5]) + (f"; and {len(troubles) - 5} more" if len(troubles) > 5 else "")
        raise StoreError(
            f"this artefact is not what was sealed: {shown}",
            where=str(folder),
            hint="delete this folder and run the recipe again: what is missing is made anew",
        )
    return str(manifest["digest"])


def publish(folder: Path, target: Path) -> None:
    """Move a sealed folder to its place in one rename. The same content already there: drop `folder`.

    A target that fails its own check is set aside as `….damaged-…`, never overwritten or deleted.
    """
    folder, target = Path(folder), Path(target)
    digest = verify(folder, deep=False)
    with _named(target, "publish"):
        target.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(3):  # a second try after setting damage aside, a third for a race with another run
            try:
                os.rename(folder, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            else:
                _fsync(target.parent)
                _fsync(folder.parent)
                return
            if _settled(target, digest):
                shutil.rmtree(folder)
                return
    raise StoreError("another run keeps writing to this place", where=str(target), hint="run again")


def _settled(target: Path, digest: str) -> bool:
    """True when `target` is whole and is `digest`; damage is set aside, other content is an error."""
    try:
        there = verify(target)
    except StoreError:
        with suppress(FileNotFoundError):  # another run may have set it aside first
            os.rename(target, target.with_name(f"{target.name}.damaged-{secrets.token_hex(4)}"))
        return False
    if there != digest:
        raise StoreError(
            f"another artefact is already here: {there[:12]}, not {digest[:12]}",
            where=str(target),
            hint="artefacts are never overwritten; publish under the artefact's own digest",
        )
    return True


def link_tree(src: Path, dst: Path) -> None:
    """Hard-link every file of `src` below `dst`; copy where the file system cannot link.

    Linked files share their bytes: replace them (as `write_bytes` does), never write into them.
    """
    src, dst = Path(src), Path(dst)
    with _named(dst, "write"):
        dst.mkdir(parents=True, exist_ok=True)
        for name, path in _files(src, manifest=True).items():
            place = dst / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                os.link(path, place)
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
                    raise
                shutil.copyfile(path, place)


def _files(folder: Path, manifest: bool = False) -> dict[str, Path]:
    """Every file below `folder` by its relative name, sorted; anything but files and folders is refused."""
    found: dict[str, Path] = {}
    with _named(folder, "read"):
        if not stat.S_ISDIR(folder.lstat().st_mode):
            raise StoreError("an artefact must be a folder", where=str(folder))
        for parent, folders, names in os.walk(folder, onerror=_raise):
            for path in (Path(parent, name) for name in (*folders, *names)):
                mode = path.lstat().st_mode
                if stat.S_ISREG(mode):
                    found[path.relative_to(folder).as_posix()] = path
                elif not stat.S_ISDIR(mode):
                    kind = "a symbolic link" if stat.S_ISLNK(mode) else "a device, socket or pipe"
                    hint = "copy the file itself"
                    raise StoreError(f"{kind} has no place in an artefact", where=str(path), hint=hint)
    if not manifest:
        found.pop(MANIFEST, None)
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    raise error  # os.walk would skip a folder it cannot read, and sealing would lose files without a word


def _entry(path: Path) -> Entry:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


def _manifest(entries: Mapping[str, Entry]) -> dict[str, Any]:
    files = {name: entry for name, entry in entries.items() if not name.startswith(OBSERVED)}
    observed = {name: entry for name, entry in entries.items() if name.startswith(OBSERVED)}
    return {"luthier": FORMAT, "files": files, "observed": observed, "digest": digest_of(files)}


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, if its own bytes are exactly what `seal` would write for the entries it lists."""
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise StoreError("missing manifest.json: this folder was never sealed", where=str(folder))
    with _named(path, "read"):
        data = path.read_bytes()
    manifest = _parse(data, str(path))
    if (
        isinstance(manifest, dict)
        and isinstance(version := manifest.get("luthier"), int)
        and version > FORMAT
    ):
        raise StoreError(f"this manifest is of format {version}", where=str(path), hint="use a newer luthier")
    try:
        again = canonical(_manifest(manifest["files"] | manifest["observed"])) + b"\n"
        whole = again == data and all(
            _is_entry(e) for e in (manifest["files"] | manifest["observed"]).values()
        )
    except (AttributeError, KeyError, TypeError, StoreError):
        whole = False
    if not whole:
        raise StoreError("damaged manifest.json: it does not agree with itself", where=str(path))
    return dict(manifest)


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
    )
