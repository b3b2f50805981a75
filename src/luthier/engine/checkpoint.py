"""Checkpoints that a crash at any moment cannot hurt: a folder is whole and named, or it is not there.

Order of a save (as in git's object store): every file is written to a temporary folder and fsynced, the
manifest with each SHA-256 goes last, then one rename. Tensors are safetensors, state is JSON; nothing is
ever unpickled. Records that only grow (curve, ledger) are JSONL journals beside the checkpoints; a
checkpoint holds their length and SHA-256, and a resume cuts them back to it.

Layout: `step-00000040/` (two newest), `best-00000025/` (what the newest ones point at), `*.jsonl`.
It does not know what the tensors mean, nor what a step is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from luthier import artifacts
from luthier.errors import StoreError

KEEP = 2
_PARTIAL = "partial-"


@dataclass(frozen=True)
class Checkpoint:
    """One that verified: its tensors and its state, read back."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    best: dict[str, Tensor] | None


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `step-…`; `state["best"]`, if any, is the step of a `best-…` folder saved before."""
    _write(folder, f"step-{step:08d}", tensors, {**state, "step": step})
    _prune(folder)


def save_best(folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    _write(folder, f"best-{step:08d}", tensors, {"step": step})


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    partial, target = folder / f"{_PARTIAL}{name}", folder / name
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise StoreError(f"cannot make a checkpoint: {error.strerror}", where=str(partial)) from error
    ordered = {key: tensors[key].contiguous() for key in sorted(tensors)}
    try:
        artifacts.write_bytes(partial / "tensors.safetensors", tensor_bytes(ordered))
        artifacts.write_json(partial / "state.json", dict(state))
        artifacts.seal(partial)
        if target.exists():  # it was passed over at resume (damaged, or of another training)
            shutil.rmtree(target)
        artifacts.publish(partial, target)
    except StoreError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise


def newest(folder: Path, identity: str) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest checkpoint of this very training that is whole, and a line for each that was skipped.

    Its journals are cut back to its length as a side effect, so what follows is appended where it belongs.
    """
    skipped: list[str] = []
    for path in _steps(folder):
        try:
            artifacts.verify(path)
            state = artifacts.read_json(path / "state.json")
            if state.get("identity") != identity:
                raise StoreError("this checkpoint belongs to another training", where=str(path))
            best = None
            if state.get("best") is not None:
                artifacts.verify(folder / f"best-{state['best']:08d}")
                best = _tensors(folder / f"best-{state['best']:08d}")
            tensors = _tensors(path)
            for name, mark in state["journals"].items():
                rewind(folder / name, mark)
        except StoreError as error:
            skipped.append(f"{path.name} skipped: {str(error).splitlines()[0]}")
            continue
        return Checkpoint(state["step"], tensors, state, best), tuple(skipped)
    return None, tuple(skipped)


def _tensors(path: Path) -> dict[str, Tensor]:
    file = path / "tensors.safetensors"
    try:
        tensors: dict[str, Tensor] = load_tensors(file.read_bytes())
        return tensors
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the tensors cannot be read: {error}", where=str(file)) from error


def _steps(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted(found, reverse=True)


def _prune(folder: Path) -> None:
    """Keep the newest two and the best ones that they point at; drop what a kill left half written."""
    kept = _steps(folder)[:KEEP]
    wanted = {path.name for path in kept}
    for path in kept:
        try:
            best = artifacts.read_json(path / "state.json").get("best")
        except StoreError:
            continue  # a resume passes over a damaged one; it must not stop a sound one from being kept
        if best is not None:
            wanted.add(f"best-{best:08d}")
    for path in folder.iterdir():
        if path.is_dir() and path.name not in wanted and path.name.startswith(("step-", "best-", _PARTIAL)):
            shutil.rmtree(path, ignore_errors=True)


# ---- journals ----------------------------------------------------------------------------------------


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add lines. They count once a checkpoint holds a mark behind them."""
    try:
        with open(path, "ab") as file:
            file.writelines(artifacts.canonical(record) + b"\n" for record in records)
    except OSError as error:
        raise StoreError(f"cannot append to it: {error.strerror}", where=str(path)) from error


def mark(path: Path) -> dict[str, Any]:
    """Make a journal durable and say how long it is and what is in it."""
    try:
        with open(path, "ab+") as file:
            os.fsync(file.fileno())
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise StoreError(f"cannot keep it: {error.strerror}", where=str(path)) from error
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rewind(path: Path, to: Mapping[str, Any]) -> None:
    """Cut a journal back to a mark; `StoreError` if what lies before it is not what was marked."""
    try:
        data = path.read_bytes() if path.exists() else b""
        head = data[: to["bytes"]]
        if hashlib.sha256(head).hexdigest() != to["sha256"]:
            raise StoreError("the journal is not what the checkpoint saw", where=str(path))
        if len(data) != len(head):
            artifacts.write_bytes(path, head)
    except OSError as error:
        raise StoreError(f"cannot read it back: {error.strerror}", where=str(path)) from error
