"""Checkpoints that a crash at any moment cannot hurt: a folder is whole and named, or it is not there.

Order of a save (as in git's object store): every file is written to a temporary folder and fsynced, the
manifest with each SHA-256 goes last, then one rename. Tensors are safetensors, state is JSON; nothing is
ever unpickled. A checkpoint leans on no other file: weights, moments, the best weights so far and all
records (curve, ledger of rows) lie in its own folder, so damage elsewhere cannot take it along.

Layout: `step-00000040/`, the two newest, each with `tensors.safetensors`, `state.json` and `*.jsonl`.
It does not know what the tensors mean, nor what a step is. There is no generator state to keep: the order
of rows, their packing and the noise are functions of the seed and the step (`engine.batch`, `engine.loop`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from luthier import artifacts
from luthier.errors import StoreError

KEEP = 2
TENSORS, STATE = "tensors.safetensors", "state.json"
_STEP, _PARTIAL = "step-", "partial-"
_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """All that a training goes on from. `journals` are the bytes of its records, by file name."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    journals: Mapping[str, bytes] = field(default_factory=dict)


def save(folder: Path, made: Checkpoint) -> None:
    """Write `step-…`; return when it is on disk. An older one of that step gives way."""
    name = f"{_STEP}{made.step:08d}"
    partial, target = folder / f"{_PARTIAL}{name}", folder / name
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tensors(partial / TENSORS, made.tensors)
        artifacts.write_json(partial / STATE, {**made.state, "step": made.step})
        for journal, lines in made.journals.items():
            artifacts.write_bytes(partial / journal, lines)
        artifacts.seal(partial)
        if target.exists():  # it was passed over at resume (damaged, or of another training)
            shutil.rmtree(target)
        artifacts.publish(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        where = str(error.filename or partial)
        raise StoreError(f"cannot save a checkpoint: {error.strerror}", where=where) from error
    except StoreError:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        raise
    _prune(folder, made.step)


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, whole and on disk or not there."""
    artifacts.write_chunks(file, _chunks(tensors))


def _chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece, straight from the tensors' memory.

    The library would build the whole file in memory while it holds the interpreter's lock, and training in
    another thread would stand still for as long.
    """
    # Wide numbers first, as the library has it: a reader that maps the file needs each of them aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    whole = {name: tensors[name].detach().contiguous() for name in order}
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in whole.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in whole.values():
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def newest(folder: Path, identity: str) -> tuple[Checkpoint | None, tuple[str, ...]]:
    """The newest checkpoint of this very training that is whole, and a line for each that was skipped."""
    skipped: list[str] = []
    for path in _steps(folder):
        try:
            artifacts.verify(path)
            state = artifacts.read_json(path / STATE)
            if state.get("identity") != identity:
                raise StoreError("this checkpoint belongs to another training", where=str(path))
            found = Checkpoint(state["step"], read_tensors(path / TENSORS), state, _journals(path))
        except StoreError as error:
            skipped.append(f"{path.name} skipped: {str(error).splitlines()[0]}")
            continue
        return found, tuple(skipped)
    return None, tuple(skipped)


def read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_tensors(file.read_bytes())
        return tensors
    except (OSError, SafetensorError) as error:
        raise StoreError(f"the tensors cannot be read: {error}", where=str(file)) from error


def _journals(path: Path) -> dict[str, bytes]:
    try:
        return {file.name: file.read_bytes() for file in sorted(path.glob("*.jsonl"))}
    except OSError as error:
        where = str(error.filename or path)
        raise StoreError(f"the records cannot be read: {error.strerror}", where=where) from error


def _steps(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob(f"{_STEP}*") if path.name.removeprefix(_STEP).isdigit()]
    return sorted(found, reverse=True)


def _prune(folder: Path, step: int) -> None:
    """Keep the newest two up to `step`; drop the rest and what a kill left half written.

    A later one was passed over when this training resumed: kept, it would push out a sound one.
    """
    past = [path for path in _steps(folder) if int(path.name.removeprefix(_STEP)) <= step]
    kept = {path.name for path in past[:KEEP]}
    for path in folder.iterdir():
        if path.is_dir() and path.name not in kept and path.name.startswith((_STEP, _PARTIAL)):
            shutil.rmtree(path, ignore_errors=True)
