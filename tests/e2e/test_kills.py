"""kill -9 in any stage, SIGTERM, two runs at once: the same command goes on and ends with the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import LUTHIER, environment, luthier, make_world

SLOW = ("--set", "train.0.steps=120", "--set", "train.0.checkpoint_every=3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    recipe = make_world(folder / "toy")
    return recipe, luthier(folder / "home", "run", str(recipe), *SLOW, "--json")


def digests(said: dict[str, Any]) -> dict[str, str]:
    return {
        stage: said["stages"][stage]["digest"] for stage in ("data", "model", "plan", "train", "evaluate")
    }


def start(home: Path, recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*LUTHIER, "run", str(recipe), *SLOW], env=environment(home), stderr=subprocess.PIPE, text=True
    )


def wait_for_line(process: subprocess.Popen[str], word: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"the run ended before it said {word!r}")


def test_five_kills_in_training_end_with_the_uninterrupted_adapter(whole: Any, tmp_path: Path) -> None:
    recipe, expected = whole
    draw = random.Random(11)
    for _ in range(5):
        process = start(tmp_path, recipe)
        wait_for_line(process, "train")
        time.sleep(draw.uniform(0.0, 2.5))
        process.kill()
        process.communicate()
    said = luthier(tmp_path, "run", str(recipe), *SLOW, "--json")
    assert digests(said) == digests(expected)
    statuses = [run["status"] for run in luthier(tmp_path, "runs", "--json")]
    assert statuses == ["done"] + ["interrupted"] * 5


@pytest.mark.parametrize("stage", ["data", "model", "plan", "evaluate", "release", "monitor"])
def test_a_kill_in_any_other_stage_costs_only_that_stage(whole: Any, tmp_path: Path, stage: str) -> None:
    recipe, expected = whole
    process = start(tmp_path, recipe)
    wait_for_line(process, stage)
    process.kill()
    process.communicate()
    said = luthier(tmp_path, "run", str(recipe), *SLOW, "--json")
    assert digests(said) == digests(expected)
    assert not list((tmp_path / "work").iterdir())


def test_sigterm_in_training_saves_and_leaves_with_its_own_exit_code(whole: Any, tmp_path: Path) -> None:
    recipe, expected = whole
    process = start(tmp_path, recipe)
    wait_for_line(process, "train")
    time.sleep(1.0)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == 75 and "Traceback" not in said
    assert digests(luthier(tmp_path, "run", str(recipe), *SLOW, "--json")) == digests(expected)


def test_two_runs_of_one_recipe_at_once_both_end_well_and_build_each_stage_once(
    whole: Any, tmp_path: Path
) -> None:
    recipe, expected = whole
    pair = [start(tmp_path, recipe) for _ in range(2)]
    for process in pair:
        _, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
    runs = [luthier(tmp_path, "show", run["run"], "--json") for run in luthier(tmp_path, "runs", "--json")]
    assert digests(runs[0]) == digests(runs[1]) == digests(expected)
    for stage in ("data", "train", "release"):
        assert sorted(run["stages"][stage]["reused"] for run in runs) == [False, True]
