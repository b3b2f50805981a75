"""A checkpoint is whole or passed over, and the message says which file was wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier import artifacts
from luthier.engine import checkpoint
from luthier.errors import StoreError

ME = "identity"


def tensors(step: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    return {"weight:a": torch.randn(5, 3, generator=noise), "exp_avg:a": torch.randn(5, 3, generator=noise)}


def save(folder: Path, step: int, best: int | None = None) -> None:
    folder.mkdir(exist_ok=True)
    checkpoint.append(folder / "curve.jsonl", [{"step": step}])
    if best is not None:
        checkpoint.save_best(folder, best, tensors(1000 + best))
    journals = {"curve.jsonl": checkpoint.mark(folder / "curve.jsonl")}
    checkpoint.save(
        folder, step, tensors(step), {"identity": ME, "journals": journals, "best": best, "x": 0.1}
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def newest(folder: Path) -> tuple[checkpoint.Checkpoint, tuple[str, ...]]:
    found, skipped = checkpoint.newest(folder, ME)
    assert found is not None
    return found, skipped


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3, best=2)
    found, skipped = newest(tmp_path)
    assert found.step == 3 and not skipped and found.state["x"] == 0.1
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors(3).items())
    assert found.best is not None and torch.equal(found.best["weight:a"], tensors(1002)["weight:a"])


def test_only_the_newest_two_and_their_best_stay(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        save(tmp_path, step, best)
    assert names(tmp_path) == {"step-00000003", "step-00000004", "best-00000003"}


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent", ME) == (None, ())


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_newest_is_passed_over_and_the_file_named(tmp_path: Path, file: str, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = tmp_path / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(bytes(data if damage == "flip" else data[: len(data) // 2]))
    found, skipped = newest(tmp_path)
    assert found.step == 1
    assert len(skipped) == 1 and "step-00000002" in skipped[0] and file in skipped[0]


def test_every_single_bit_flip_is_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    draw = random.Random(2)
    files = sorted(path for path in (tmp_path / "step-00000001").iterdir())
    for _ in range(60):
        path = draw.choice(files)
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(bad))
        found, skipped = checkpoint.newest(tmp_path, ME)
        assert found is None and len(skipped) == 1, path
        path.write_bytes(good)
    assert checkpoint.newest(tmp_path, ME)[0] is not None


def test_a_checkpoint_without_its_best_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, best=1)
    save(tmp_path, 2, best=2)
    (tmp_path / "best-00000002" / "tensors.safetensors").write_bytes(b"torn")
    found, skipped = newest(tmp_path)
    assert found.step == 1 and "best-00000002" in skipped[0]


def test_a_half_written_folder_is_never_chosen_and_goes_at_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "partial-step-00000002").mkdir()
    (tmp_path / "partial-step-00000002" / "tensors.safetensors").write_bytes(b"half")
    assert newest(tmp_path)[0].step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == {"step-00000001", "step-00000002"}


def test_journals_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.append(tmp_path / "curve.jsonl", [{"step": 2}, {"step": 3}])
    with open(tmp_path / "curve.jsonl", "ab") as file:
        file.write(b'{"step"')  # torn by a kill
    newest(tmp_path)
    assert artifacts.read_jsonl(tmp_path / "curve.jsonl") == [{"step": 1}]


def test_a_changed_journal_rules_its_checkpoint_out(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    lines = (tmp_path / "curve.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "curve.jsonl").write_bytes(lines[0] + b'{"step":9}\n')
    found, skipped = newest(tmp_path)
    assert found.step == 1 and "curve.jsonl" in skipped[0]


def test_a_checkpoint_of_another_training_is_not_taken_and_gives_way(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found, skipped = checkpoint.newest(tmp_path, "someone else")
    assert found is None and "another training" in skipped[0]
    save(tmp_path, 1)
    assert newest(tmp_path)[0].step == 1


def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    real = artifacts.os.fsync
    left = [4]

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    for room in range(12):
        left[0] = room
        monkeypatch.setattr(artifacts.os, "fsync", full)
        with pytest.raises(StoreError, match="disk is full"):
            checkpoint.save(tmp_path, 2, tensors(2), {"identity": ME, "journals": {}, "best": None})
        monkeypatch.setattr(artifacts.os, "fsync", real)
        if (tmp_path / "step-00000002").exists():
            break  # the rename is done: only the last fsync of the folder failed
        assert newest(tmp_path)[0].step == 1
        assert names(tmp_path) == {"step-00000001"}


def test_state_is_plain_json(tmp_path: Path) -> None:
    save(tmp_path, 1)
    state: dict[str, Any] = json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    assert state["step"] == 1 and state["identity"] == ME
