"""The train stage: the same bytes every time, resumed or not, and records that add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from luthier import artifacts
from luthier.errors import Interrupted, TrainError
from luthier.stages import Event, Inputs, plan, train
from tests.stages.training import phase, planning, world


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("train")
    return with_plan(world(folder, tiny_base), folder)


def with_plan(inputs: Inputs, folder: Path, **changes: Any) -> Inputs:
    out = folder / "plan"
    out.mkdir()
    plan.run(planning(**changes), inputs, out)
    digests = {**inputs.digests, "plan": artifacts.seal(out)}
    return replace(inputs, artefacts={**inputs.artefacts, "plan": out}, digests=digests)


def run(inputs: Inputs, folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Train into `folder`/out with `folder`/scratch; return the artefact's digest and the facts."""
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    facts = train.run((phase(**changes),), replace(inputs, scratch=scratch), out)
    return artifacts.seal(out), facts


@pytest.fixture(scope="module")
def whole(planned: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", *run(planned, folder)


def test_two_trainings_leave_the_same_bytes(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    digest, facts = run(planned, tmp_path)
    assert digest == whole[1]
    assert facts["loss_last"] == whole[2]["loss_last"] < whole[2]["loss_first"]


def test_the_records_add_up(planned: Inputs, whole: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, facts = whole
    curve, ledger = artifacts.read_jsonl(out / "curve.jsonl"), artifacts.read_jsonl(out / "ledger.jsonl")
    looks = artifacts.read_jsonl(out / "validation.jsonl")
    decisions = artifacts.read_json(planned.artefacts["plan"] / "plan.json")
    assert [row["step"] for row in curve] == [row["step"] for row in ledger] == list(range(1, 13))
    assert [row["step"] for row in looks] == [0, 4, 8, 12]
    assert all(len(row["rows"]) == 4 for row in ledger)
    assert facts["useful_tokens"] == sum(row["tokens"] for row in curve) == decisions["tokens"]
    assert facts["loss_tokens"] == decisions["loss_tokens"]
    computed = sum(row["computed_tokens"] for row in curve)
    assert facts["computed_tokens"] == computed == decisions["computed_tokens"] <= facts["useful_tokens"]
    assert facts["trainable_parameters"] == decisions["trainable_parameters"]
    assert facts["trainable_share"] == pytest.approx(decisions["trainable_share"], rel=1e-3)
    assert all(0 <= row["accuracy"] <= 1 for row in (*curve, *looks))
    assert looks[-1]["accuracy"] > looks[0]["accuracy"]
    best = min(looks, key=lambda row: row["loss"])
    assert (facts["best_step"], facts["validation_loss"]) == (best["step"], best["loss"])
    assert facts["peak_rss_bytes"] > 0 and facts["train_seconds"] >= facts["step_seconds"] > 0
    first_epoch = [row for step in ledger[:10] for row in step["rows"]]
    assert len(set(first_epoch)) == 40


def test_only_plain_files_are_left_and_no_local_path_is_in_them(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]]
) -> None:
    out, _, _ = whole
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "curve.jsonl", "ledger.jsonl",
        "validation.jsonl", "phase.json", "manifest.json", "observed/timings.jsonl", "observed/saves.jsonl",
        "observed/host.json",
    }  # fmt: skip
    for name in names:
        assert str(planned.root).encode() not in (out / name).read_bytes(), name
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "luthier-base:0123456789ab"


def test_progress_is_told_with_the_figures_people_watch(planned: Inputs, tmp_path: Path) -> None:
    events: list[Event] = []
    run(replace(planned, tell=events.append), tmp_path)
    steps = [event for event in events if "loss" in event.facts]
    assert [event.done for event in steps] == list(range(1, 13)) and {event.total for event in steps} == {12}
    for event in steps:
        assert {"loss", "tokens_per_s", "eta_s", "rss_gb", "lr"} <= event.facts.keys()
    assert steps[-1].facts["eta_s"] == 0


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 7, 8, 11])
def test_a_stop_saves_and_the_rest_ends_with_the_same_bytes(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path, after: int
) -> None:
    seen: list[int] = []

    def tell(event: Event) -> None:
        if "loss" in event.facts:
            seen.append(event.done or 0)

    with pytest.raises(Interrupted, match=f"step {after} of 12" if after else "before it began"):
        run(replace(planned, tell=tell, stopping=lambda: len(seen) >= after), tmp_path)
    first = list(seen)
    digest, facts = run(replace(planned, tell=tell), tmp_path)
    assert digest == whole[1]
    assert first + seen[len(first) :] == list(range(1, 13))  # nothing done twice, nothing left out
    assert facts["useful_tokens"] == whole[2]["useful_tokens"]


@pytest.mark.parametrize("looks", [1, 2, 3, 5, 8, 13, 21])
def test_a_stop_in_the_middle_of_a_step_or_a_look_drops_it_and_changes_nothing(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path, looks: int
) -> None:
    asked = [0]

    def stopping() -> bool:
        asked[0] += 1
        return asked[0] > looks

    with pytest.raises(Interrupted):
        run(replace(planned, stopping=stopping), tmp_path)
    assert run(planned, tmp_path)[0] == whole[1]


def test_every_save_is_on_record_with_its_stall(whole: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, facts = whole
    saves = artifacts.read_jsonl(out / "observed" / "saves.jsonl")
    assert saves[0]["step"] == 0 and saves[-1]["step"] == 12
    assert facts["longest_stall_s"] == max(save["stall_s"] for save in saves) > 0
    assert all(save["stall_s"] <= save["seconds"] + 1e-3 for save in saves)


def test_two_damaged_checkpoints_are_passed_over_and_push_no_sound_one_out(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    for steps in (7, 2):
        told: list[int] = []
        tell = lambda event, told=told: told.append(1) if "loss" in event.facts else None  # noqa: E731
        with pytest.raises(Interrupted):
            run(replace(planned, tell=tell, stopping=lambda told=told, n=steps: len(told) >= n), tmp_path)
        folder = tmp_path / "scratch" / "checkpoints"
        if steps == 7:
            for path in folder.glob("step-*"):
                (path / "state.json").write_bytes(b"{}")
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000000", "step-00000002"]
    assert run(planned, tmp_path)[0] == whole[1]


SPIKY: dict[str, Any] = {"steps": 30, "lr": 1e-6, "schedule": "constant", "warmup": 0.0, "spike": 1.01}
SPIKY["validation"] = {"every": 4, "rows": 6, "patience": 30}


def test_skipped_steps_stand_in_the_ledger_with_rows_and_reason_resumed_or_not(
    tiny_base: Path, tmp_path: Path
) -> None:
    spiky = {**SPIKY, "on_sick": "skip"}
    inputs = with_plan(world(tmp_path, tiny_base), tmp_path, **spiky)
    digest, facts = run(inputs, tmp_path / "a", **spiky)
    out = tmp_path / "a" / "out"
    curve, ledger = artifacts.read_jsonl(out / "curve.jsonl"), artifacts.read_jsonl(out / "ledger.jsonl")
    skipped = [entry for entry in ledger if "skipped" in entry]
    assert 0 < len(skipped) == facts["skipped_steps"] and len(ledger) == facts["steps"]
    assert all(len(entry["rows"]) == 4 and "the loss of step" in entry["skipped"] for entry in skipped)
    learnt = {row["step"] for row in curve}
    assert learnt.isdisjoint(entry["step"] for entry in skipped) and len(learnt) >= 8
    for number, step in enumerate((skipped[0]["step"], skipped[0]["step"] + 1, facts["steps"] - 1)):
        seen: list[int] = []
        tell = lambda event, seen=seen: seen.append(event.done or 0)  # noqa: E731
        folder = tmp_path / f"b{number}"
        with pytest.raises(Interrupted):
            run(replace(inputs, tell=tell, stopping=lambda at=step, s=seen: at in s), folder, **spiky)
        assert run(inputs, folder, **spiky)[0] == digest


def test_a_spike_stops_the_training_unless_the_recipe_says_skip(tiny_base: Path, tmp_path: Path) -> None:
    inputs = with_plan(world(tmp_path, tiny_base), tmp_path, **SPIKY)
    with pytest.raises(TrainError, match=r"rows .*the loss of step"):
        run(inputs, tmp_path / "run", **SPIKY)


def test_sick_steps_without_end_are_not_skipped_for_ever(tiny_base: Path, tmp_path: Path) -> None:
    hot = {"lr": 1.0, "schedule": "constant", "warmup": 0.0, "steps": 40, "weight_decay": 1e6}
    inputs = with_plan(world(tmp_path, tiny_base, validation=0), tmp_path, on_sick="skip", **hot)
    with pytest.raises(TrainError, match="8 steps in a row were skipped") as caught:
        run(inputs, tmp_path / "run", on_sick="skip", **hot)
    assert "lower `lr`" in str(caught.value)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path
) -> None:
    events: list[Event] = []
    with pytest.raises(Interrupted):
        run(replace(planned, tell=events.append, stopping=lambda: any(e.done == 7 for e in events)), tmp_path)
    before, newest = sorted((tmp_path / "scratch" / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000007"
    torn = newest / "tensors.safetensors"
    torn.write_bytes(torn.read_bytes()[:-7])
    said: list[str] = []
    digest, _ = run(replace(planned, tell=lambda event: said.append(event.message)), tmp_path)
    assert any("step-00000007" in line and "tensors.safetensors" in line for line in said)
    assert any(f"after step {int(before.name[5:])}" in line for line in said)
    assert digest == whole[1]


def test_early_stopping_keeps_the_best_adapter_even_when_resumed(tiny_base: Path, tmp_path: Path) -> None:
    hot = {"lr": 1.0, "schedule": "constant", "warmup": 0.0, "steps": 60, "clip": 1e9}
    hot["validation"] = {"every": 2, "rows": 6, "patience": 2}
    hot["method"] = {"name": "lora", "r": 4, "alpha": 128}  # far too strong: it soon gets worse
    inputs = with_plan(world(tmp_path, tiny_base), tmp_path, **hot)
    digest, facts = run(inputs, tmp_path / "a", **hot)
    assert facts["stopped_early"] and facts["best_step"] < facts["steps"] < 60
    looks = artifacts.read_jsonl(tmp_path / "a" / "out" / "validation.jsonl")
    assert facts["best_step"] == min(looks, key=lambda row: row["loss"])["step"]
    assert facts["steps"] == looks[-1]["step"] == facts["best_step"] + 4
    seen: list[int] = []
    tell = lambda event: seen.append(event.done or 0)  # noqa: E731
    with pytest.raises(Interrupted):
        run(replace(inputs, tell=tell, stopping=lambda: 3 in seen), tmp_path / "b", **hot)
    assert run(inputs, tmp_path / "b", **hot)[0] == digest


def test_without_validation_rows_the_last_adapter_is_left(tiny_base: Path, tmp_path: Path) -> None:
    inputs = with_plan(world(tmp_path, tiny_base, validation=0), tmp_path)
    _, facts = run(inputs, tmp_path / "run")
    assert facts["best_step"] == facts["steps"] == 12 and facts["validation_loss"] is None
    assert (tmp_path / "run" / "out" / "validation.jsonl").read_bytes() == b""
    tensors = load_file(tmp_path / "run" / "out" / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in tensors.items() if "lora_B" in name)


def test_a_rate_that_explodes_is_stopped_with_rows_and_a_hint(tiny_base: Path, tmp_path: Path) -> None:
    hot = {"lr": 1.0, "schedule": "constant", "warmup": 0.0, "steps": 40, "weight_decay": 1e6}
    inputs = with_plan(world(tmp_path, tiny_base), tmp_path, **hot)
    with pytest.raises(TrainError, match="rows ") as caught:
        run(inputs, tmp_path / "run", **hot)
    assert "lower `lr`" in str(caught.value)
