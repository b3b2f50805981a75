"""Adapters kept on the way: of the steps asked for, the last of them, the same bytes after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from luthier import artifacts
from luthier.errors import Interrupted, StoreError
from luthier.stages import Event, Inputs, _kept
from tests.stages.test_train import run, with_plan
from tests.stages.training import phase, world

KEEP: dict[str, Any] = {"keep": {"at": [2, 5, 9, 12], "last": 3}}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("kept")
    return with_plan(world(folder, tiny_base), folder, **KEEP)


@pytest.fixture(scope="module")
def whole(planned: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", *run(planned, folder, **KEEP)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_last_of_the_asked_steps_are_kept_with_what_was_said_of_them(
    whole: tuple[Path, str, dict[str, Any]],
) -> None:
    out, _, facts = whole
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-5", "step-9", "step-12"}
    curve = {row["step"]: row for row in artifacts.read_jsonl(out / "curve.jsonl")}
    looks = {row["step"]: row for row in artifacts.read_jsonl(out / "validation.jsonl")}
    assert [entry["step"] for entry in facts["checkpoints"]] == [5, 9, 12]
    for entry in facts["checkpoints"]:
        step = entry["step"]
        assert (entry["loss"], entry["accuracy"]) == (curve[step]["loss"], curve[step]["accuracy"])
        assert entry["validation_loss"] == looks[step]["loss"]
        assert entry["validation_accuracy"] == looks[step]["accuracy"]
    artifacts.verify(out)


def test_a_kept_adapter_is_what_a_training_that_ended_there_would_leave(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]]
) -> None:
    out, _, facts = whole
    best = facts["best_step"]
    assert best in (9, 12)
    found, kept = weights(out / "adapter"), weights(out / "checkpoints" / f"step-{best}" / "adapter")
    other = weights(out / "checkpoints" / "step-5" / "adapter")
    assert found.keys() == kept.keys() and all(torch.equal(found[name], kept[name]) for name in found)
    assert any(not torch.equal(found[name], other[name]) for name in found)
    configs = [path.read_bytes() for path in out.rglob("adapter_config.json")]
    assert len(configs) == 4 and len(set(configs)) == 1


@pytest.mark.parametrize("after", [1, 2, 5, 6, 9, 11])
def test_a_stop_anywhere_changes_no_byte_of_what_is_kept(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path, after: int
) -> None:
    seen: list[int] = []

    def tell(event: Event) -> None:
        if "loss" in event.facts:
            seen.append(event.done or 0)

    with pytest.raises(Interrupted):
        run(replace(planned, tell=tell, stopping=lambda: len(seen) >= after), tmp_path, **KEEP)
    assert run(planned, tmp_path, **KEEP)[0] == whole[1]


def test_a_kept_adapter_that_was_damaged_meanwhile_is_named(planned: Inputs, tmp_path: Path) -> None:
    seen: list[int] = []
    tell = lambda event: seen.append(event.done or 0)  # noqa: E731
    with pytest.raises(Interrupted):
        run(replace(planned, tell=tell, stopping=lambda: 6 in seen), tmp_path, **KEEP)
    (tmp_path / "scratch" / "checkpoints" / "kept" / "5.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="after step 5 is damaged"):
        run(planned, tmp_path, **KEEP)


def test_an_epoch_ends_with_the_step_that_reads_its_last_row() -> None:
    epochs = phase(keep={"at": "epochs"}, batch=4)
    assert _kept.due(epochs, rows=40, steps=25) == {10, 20}
    assert _kept.due(epochs, rows=10, steps=8) == {3, 5, 8}
    assert _kept.due(epochs, rows=2, steps=2) == {1, 2}  # several epochs may end in one step
    assert _kept.due(phase(), rows=40, steps=25) == frozenset()
    assert _kept.looks(epochs, rows=10, steps=8) == (0, 3, 4, 5, 8)


def test_a_step_to_keep_that_never_comes_is_refused() -> None:
    with pytest.raises(ValidationError, match="names step 13; there are 12"):
        phase(keep={"at": [13]})
