"""A checkpoint is whole or passed over, and the message says which file was wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from luthier.engine import checkpoint

ME = "identity"


def tensors(step: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(step)
    return {
        "weight:a": torch.randn(5, 3, generator=noise),
        "exp_avg:a": torch.randn(3, 5, generator=noise).T,
        "best:weight:a": torch.randn(7, generator=noise).to(torch.bfloat16),
        "moves:a": torch.tensor(float(step)),
        "none": torch.zeros(0, 3),
    }


def made(step: int, identity: str = ME) -> checkpoint.Checkpoint:
    lines = b"".join(b'{"step":%d}\n' % n for n in range(step))
    state = {"identity": identity, "x": 0.1}
    return checkpoint.Checkpoint(step, tensors(step), state, {"curve.jsonl": lines})


def save(folder: Path, step: int) -> None:
    checkpoint.save(folder, made(step))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_dir()}


def newest(folder: Path) -> tuple[checkpoint.Checkpoint, tuple[str, ...]]:
    found, skipped = checkpoint.newest(folder, ME)
    assert found is not None
    return found, skipped


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    found, skipped = newest(tmp_path)
    assert found.step == 3 and not skipped and found.state["x"] == 0.1
    assert found.journals == made(3).journals
    assert found.tensors.keys() == tensors(3).keys()
    for name, value in tensors(3).items():
        assert torch.equal(found.tensors[name], value) and found.tensors[name].dtype == value.dtype


def test_any_tool_that_reads_safetensors_reads_the_tensors(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with safe_open(tmp_path / "step-00000003" / "tensors.safetensors", "pt") as file:
        assert set(file.keys()) == tensors(3).keys()
        assert torch.equal(file.get_tensor("weight:a"), tensors(3)["weight:a"])


def test_only_the_newest_two_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    assert names(tmp_path) == {"step-00000003", "step-00000004"}


def test_a_checkpoint_of_an_abandoned_future_pushes_no_sound_one_out(tmp_path: Path) -> None:
    save(tmp_path, 8)
    save(tmp_path, 9)
    for path in tmp_path.glob("step-*"):
        (path / "state.json").unlink()
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert names(tmp_path) == {"step-00000001", "step-00000002"}


def test_nothing_saved_is_nothing_found(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "absent", ME) == (None, ())


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "curve.jsonl", "manifest.json"])
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


def damaged(folder: Path, bad: list[tuple[Path, bytes]]) -> None:
    """With each of these contents in its place the checkpoint before it is found, and the folder named."""
    for path, content in bad:
        good = path.read_bytes()
        path.write_bytes(content)
        found, skipped = newest(folder)
        assert found.step == 1 and torch.equal(found.tensors["weight:a"], tensors(1)["weight:a"])
        assert len(skipped) == 1 and path.parent.name in skipped[0] and path.name in skipped[0], skipped
        path.write_bytes(good)
    assert newest(folder)[0].step == 2


def files(folder: Path) -> list[Path]:
    save(folder, 1)
    save(folder, 2)
    return sorted((folder / "step-00000002").iterdir())


def test_every_single_bit_flip_is_seen_and_the_previous_one_loads(tmp_path: Path) -> None:
    draw, bad = random.Random(2), []
    for path in files(tmp_path):
        for _ in range(100):
            content = bytearray(path.read_bytes())
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            bad.append((path, bytes(content)))
    assert len(bad) == 400
    damaged(tmp_path, bad)


def test_every_truncation_is_seen_and_the_previous_one_loads(tmp_path: Path) -> None:
    bad = []
    for path in files(tmp_path):
        content = path.read_bytes()
        lengths = {0, 1, len(content) - 1, *range(0, len(content), max(1, len(content) // 50))}
        bad += [(path, content[:length]) for length in sorted(lengths)]
    assert len(bad) > 150
    damaged(tmp_path, bad)


def test_a_block_that_never_reached_the_disk_is_seen_and_the_previous_one_loads(tmp_path: Path) -> None:
    bad = []
    for path in files(tmp_path):
        content = path.read_bytes()
        for at in range(0, len(content), 64):  # what a lying disk leaves after a power cut: blocks of zeros
            bad.append((path, content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :]))
    damaged(tmp_path, [(path, content) for path, content in bad if content != path.read_bytes()])


def test_a_half_written_folder_is_never_chosen_and_goes_at_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "partial-step-00000002").mkdir()
    (tmp_path / "partial-step-00000002" / "tensors.safetensors").write_bytes(b"half")
    assert newest(tmp_path)[0].step == 1
    save(tmp_path, 2)
    assert names(tmp_path) == {"step-00000001", "step-00000002"}


def test_a_checkpoint_of_another_training_is_not_taken_and_gives_way(tmp_path: Path) -> None:
    save(tmp_path, 1)
    found, skipped = checkpoint.newest(tmp_path, "someone else")
    assert found is None and "another training" in skipped[0]
    save(tmp_path, 1)
    assert newest(tmp_path)[0].step == 1


def test_state_is_plain_json(tmp_path: Path) -> None:
    save(tmp_path, 1)
    state: dict[str, Any] = json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    assert state["step"] == 1 and state["identity"] == ME
