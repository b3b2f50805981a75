"""Files already on this machine: rows as JSONL, CSV or Parquet, or a model as a folder or a GGUF file.

Source: relative paths start at the recipe's folder. The fingerprint is the SHA-256 of every byte.
This part does not know formats, splits or networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from luthier import plugins
from luthier.errors import FetchError

Tell = Callable[[str, int | None, int | None], None]


class Params(plugins.Params):
    files: dict[str, str] = Field(min_length=1, description="label → path")


def fetch(params: Params, root: Path, cache: Path, tell: Tell) -> dict[str, Path]:
    """The declared paths, once each of them is known to be there."""
    del cache, tell
    return {label: _existing(root, name) for label, name in params.files.items()}


def fingerprint(params: Params, root: Path) -> dict[str, str]:
    """SHA-256 of each file; of a folder, over the names and contents of all its files."""
    return {label: _digest(_existing(root, name)) for label, name in params.files.items()}


def _existing(root: Path, name: str) -> Path:
    path = root / Path(name).expanduser()
    if not path.exists():
        raise FetchError(
            "there is no such file or folder",
            where=str(path),
            hint="relative paths start at the recipe's folder",
        )
    if not path.is_file() and not path.is_dir():
        raise FetchError("neither a file nor a folder, but a pipe, a socket or a device", where=str(path))
    return path


def _digest(path: Path) -> str:
    try:
        if path.is_file():
            with path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        whole = hashlib.sha256()
        for file in sorted(item for item in path.rglob("*") if item.is_file()):
            whole.update(f"{file.relative_to(path).as_posix()}\0{_digest(file)}\n".encode())
        return whole.hexdigest()
    except OSError as error:
        raise FetchError(f"cannot be read: {error.strerror}", where=str(path)) from error
