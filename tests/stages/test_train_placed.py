"""A training of two processes under torchrun: one's curve, one's checkpoints, and nobody left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from luthier import artifacts
from luthier.errors import Interrupted, TrainError
from luthier.stages import Event, Inputs
from tests.faults import ranks_victim, train_victim
from tests.stages.test_train import run, with_plan
from tests.stages.training import planning, world

CALM: dict[str, Any] = {"steps": 30, "lr": 1e-3}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Callable[..., Inputs]:
    """The tiny world with a plan for so many processes, of so many steps."""
    folder = tmp_path_factory.mktemp("placed")
    inputs = world(folder, tiny_base)
    known: dict[str, Inputs] = {}

    def planned(placement: str, **changes: Any) -> Inputs:
        name = f"{placement}-{len(known)}"
        (folder / name).mkdir()
        budget = {"placement": placement, "processes": 1 if placement == "one" else 2}
        known[name] = with_plan(inputs, folder / name, budget=budget, **changes)
        return known[name]

    return planned


def in_one(placed: Inputs, folder: Path) -> Inputs:
    """The same plan, micro-batches too, but for who carries it out."""
    decided = artifacts.read_json(placed.artefacts["plan"] / "plan.json")
    (folder / "plan").mkdir()
    artifacts.write_json(folder / "plan" / "plan.json", decided | {"processes": 1, "placement": "one"})
    return replace(placed, artefacts={**placed.artefacts, "plan": folder / "plan"})


def same_training(one: Path, other: Path) -> None:
    """Equal up to rounding: every step's loss, every look, the rows, and the adapter."""
    assert (one / "out" / "ledger.jsonl").read_bytes() == (other / "out" / "ledger.jsonl").read_bytes()
    for name in ("curve.jsonl", "validation.jsonl"):
        pairs = zip(*(artifacts.read_jsonl(folder / "out" / name) for folder in (one, other)), strict=True)
        for mine, yours in pairs:
            assert mine["loss"] == pytest.approx(yours["loss"], rel=2e-6)
    mine, yours = (
        load_file(folder / "out" / "adapter" / "adapter_model.safetensors") for folder in (one, other)
    )
    assert mine.keys() == yours.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, yours[name], rtol=1e-4, atol=1e-5)


def stopped(inputs: Inputs, folder: Path, at: int, **changes: Any) -> int:
    """Train until step `at` was told, then ask to stop; the step that was saved."""
    seen: list[int] = []
    tell = lambda event: seen.append(event.done or 0)  # noqa: E731
    with pytest.raises(Interrupted, match="everything is saved"):
        run(replace(inputs, tell=tell, stopping=lambda: any(step >= at for step in seen)), folder, **changes)
    return int(max((folder / "scratch" / "checkpoints").glob("step-*")).name[5:])


def test_stopped_on_two_ranks_it_goes_on_in_one_and_ends_on_two_with_ones_curve(
    made: Callable[..., Inputs], tmp_path: Path
) -> None:
    two = made("ddp", **CALM)
    one = in_one(two, tmp_path)
    first = stopped(two, tmp_path / "placed", 2, **CALM)
    second = stopped(one, tmp_path / "placed", first + 3, **CALM)
    assert 2 <= first < second < 30
    said: list[Event] = []
    facts = run(replace(two, tell=said.append), tmp_path / "placed", **CALM)[1]
    assert any(f"going on after step {second}" in event.message for event in said)
    assert [event.done for event in said if "loss" in event.facts] == list(range(second + 1, 31))
    assert (facts["steps"], facts["best_step"] > 0) == (30, True)
    run(one, tmp_path / "alone", **CALM)
    same_training(tmp_path / "placed", tmp_path / "alone")
    host = artifacts.read_json(tmp_path / "placed" / "out" / "observed" / "host.json")
    assert (host["processes"], host["placement"]) == (2, "ddp")


def test_sharded_over_two_ranks_it_leaves_what_one_leaves(
    made: Callable[..., Inputs], tmp_path: Path
) -> None:
    shared = made("fsdp")
    run(in_one(shared, tmp_path), tmp_path / "alone")
    run(shared, tmp_path / "placed")
    same_training(tmp_path / "placed", tmp_path / "alone")


def test_an_error_of_the_training_comes_back_from_the_ranks_as_it_was_raised(
    made: Callable[..., Inputs], tmp_path: Path
) -> None:
    hot = {"lr": 1.0, "schedule": "constant", "warmup": 0.0, "steps": 40, "weight_decay": 1e6}
    with pytest.raises(TrainError, match="nothing was learnt from it") as caught:
        run(made("ddp", **hot), tmp_path, **hot)
    assert str(caught.value).startswith("rows ") and "lower `lr`" in str(caught.value)


@pytest.fixture
def victim(made: Callable[..., Inputs], tmp_path: Path) -> Any:
    """A long training of two ranks, at work; killed with its ranks at the end of the test."""
    inputs = made("ddp", **ranks_victim.LONG)
    for name, path in inputs.artefacts.items():
        artifacts.link_tree(path, tmp_path / name)
    for name in ("scratch", "out"):
        (tmp_path / name).mkdir()
    process = train_victim.server.Process(target=ranks_victim.stoppable, args=(tmp_path,))
    process.start()
    said, until = tmp_path / train_victim.SAID, time.monotonic() + 100
    while not (said.exists() and "\n7 training\n" in said.read_text()):
        assert process.is_alive() and time.monotonic() < until
        time.sleep(0.02)
    yield process
    process.kill()
    for pid in ranks_of(tmp_path).values():
        os.kill(pid, signal.SIGKILL)


def ranks_of(folder: Path) -> dict[int, int]:
    """Process ids of the ranks of the job in `folder`, by rank."""
    found: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            settings = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it is gone
        if str(folder / "scratch" / "job.json").encode() in words and b"torch.distributed.run" not in words:
            ranks = [int(line[5:]) for line in settings if line.startswith(b"RANK=")]
            found |= {rank: int(process.name) for rank in ranks}
    return found


def all_gone(folder: Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while ranks_of(folder) and time.monotonic() < until:
        time.sleep(0.05)
    return not ranks_of(folder)


def test_sigterm_saves_and_all_are_gone_in_ten_seconds(victim: Any, tmp_path: Path) -> None:
    assert set(ranks_of(tmp_path)) == {0, 1}
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGTERM)
    victim.join(30)
    assert time.monotonic() - began <= 10 and victim.exitcode == train_victim.ASKED
    assert all_gone(tmp_path, 0)
    told = (tmp_path / train_victim.SAID).read_text().splitlines()
    last = max(int(line.split()[0]) for line in told if line.endswith(" training"))
    saved = max((tmp_path / "scratch" / "checkpoints").glob("step-*"))
    assert saved.name == f"step-{last:08d}" and artifacts.verify(saved)


def test_a_rank_that_is_killed_is_named_and_the_training_goes_on_from_its_checkpoint(
    victim: Any, made: Callable[..., Inputs], tmp_path: Path
) -> None:
    until = time.monotonic() + 60
    while not (tmp_path / "scratch" / "checkpoints" / "step-00000005").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(ranks_of(tmp_path)[1], signal.SIGKILL)
    victim.join(60)
    assert victim.exitcode == ranks_victim.FAILED and all_gone(tmp_path, 10)
    error = (tmp_path / "error.txt").read_text()
    assert "rank 1 of 2 was killed by SIGKILL" in error and "run the same command again" in error
    kept = int(max((tmp_path / "scratch" / "checkpoints").glob("step-*")).name[5:])
    assert stopped(made("one", **ranks_victim.LONG), tmp_path, kept + 1, **ranks_victim.LONG) > kept >= 5


def test_ranks_do_not_outlive_a_caller_that_was_killed(victim: Any, tmp_path: Path) -> None:
    assert len(ranks_of(tmp_path)) == 2
    victim.kill()
    assert all_gone(tmp_path, 10)


def test_the_plan_shares_threads_and_memory_and_gives_every_rank_a_micro_batch(
    made: Callable[..., Inputs],
) -> None:
    one, two = (artifacts.read_json(made(kind).artefacts["plan"] / "plan.json") for kind in ("one", "auto"))
    assert (one["processes"], one["placement"]) == (1, "one")
    assert (two["processes"], two["placement"]) == (2, "ddp")
    assert two["threads"] == max(1, one["threads"] // 2)
    assert two["largest_micro_batch"] < one["largest_micro_batch"]


@pytest.mark.parametrize("placement, processes", [("one", 2), ("ddp", 1), ("fsdp", 1)])
def test_a_placement_that_does_not_go_with_the_processes_is_refused(placement: str, processes: int) -> None:
    with pytest.raises(
        ValueError, match=f"`placement: {placement}` does not go with `processes: {processes}`"
    ):
        planning({"placement": placement, "processes": processes})
