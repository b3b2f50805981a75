"""Files of a Hugging Face Hub repository, pinned by the full commit hash.

Source: the `huggingface_hub` client, which honours HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. A branch or
tag can move, so only a commit of 40 hexadecimal digits is taken. Of a model repository (`model: "."`) only
safetensors, tokenizer and configuration files are fetched: no pickle and no code reaches this machine.
This part does not know how to search the Hub, nor file formats.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from pydantic import Field

from luthier import plugins
from luthier.errors import FetchError

Tell = Callable[[str, int | None, int | None], None]

WHOLE = "."
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


class Params(plugins.Params):
    repo: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$", description="owner/name")
    revision: str = Field(pattern=r"^[0-9a-f]{40}$", description="the commit, in full")
    kind: Literal["model", "dataset"] = "model"
    files: dict[str, str] = Field(default={"model": WHOLE}, min_length=1, description='label → path, or "."')


def fingerprint(params: Params, root: Path) -> dict[str, str]:
    """The commit names the content, so nothing is downloaded to know it."""
    del root
    return {
        label: f"{params.kind}:{params.repo}@{params.revision}:{name}" for label, name in params.files.items()
    }


def fetch(params: Params, root: Path, cache: Path, tell: Tell) -> dict[str, Path]:
    """Each file, or the whole repository's folder, below `cache`; the network is needed once."""
    del root
    folder = cache / "hub" / f"{params.kind}--{params.repo.replace('/', '--')}" / params.revision
    found: dict[str, Path] = {}
    for label, name in params.files.items():
        complete = folder.parent / f"{params.revision}.{name.replace('/', '--')}.complete"
        if not complete.exists():
            _download(params, name, folder, tell)
            complete.touch()
        found[label] = folder if name == WHOLE else folder / name
    return found


def _download(params: Params, name: str, folder: Path, tell: Tell) -> None:
    """One file, or file by file what is wanted of a whole repository.

    Not `snapshot_download`: without a network it takes a half-filled folder for a whole one.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, kind, commit = params.repo, params.kind, params.revision
    at = f"{repo}@{commit[:8]} {name}"
    try:
        names = [name]
        if name == WHOLE:
            listed = HfApi().list_repo_files(repo, repo_type=kind, revision=commit)
            names = [
                file for file in listed if "/" not in file and any(fnmatch(file, like) for like in WANTED)
            ]
        for n, file in enumerate(names):
            tell(f"downloading {repo}@{commit[:8]} {file}", n, len(names))
            hf_hub_download(repo, file, repo_type=kind, revision=commit, local_dir=folder)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise FetchError(
            f"the Hub did not give it: {lines[0]}",
            where=at,
            hint="check the network, the repository's name and commit, and HF_TOKEN if it is private",
        ) from error
