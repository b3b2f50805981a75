"""kill -9 at random moments of training, inside saves too: the end is bit for bit the uninterrupted one."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from luthier import artifacts
from luthier.engine import checkpoint
from luthier.stages import plan
from tests.faults import train_victim
from tests.faults.train_victim import DIGEST, SAID, STEPS
from tests.stages.training import planning, world


def start(target: Any, *given: Any) -> Any:
    victim = train_victim.server.Process(target=target, args=given)
    victim.start()
    return victim


def finish(folder: Path) -> str:
    victim = start(train_victim.training, folder)
    victim.join(120)
    assert victim.exitcode == 0
    return (folder / DIGEST).read_text()


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    folder = tmp_path_factory.mktemp("planned")
    inputs = world(folder, tiny_base)
    (folder / "plan").mkdir()
    plan.run(planning(**STEPS), inputs, folder / "plan")
    artifacts.seal(folder / "plan")
    return folder


@pytest.fixture(scope="module")
def expected(planned: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return finish(copy(planned, tmp_path_factory.mktemp("whole")))


def copy(planned: Path, to: Path) -> Path:
    shutil.copytree(planned, to, dirs_exist_ok=True)
    return to


def killed_after(folder: Path, step: int, delay_s: float) -> None:
    (folder / SAID).unlink(missing_ok=True)
    victim = start(train_victim.training, folder)
    while victim.is_alive():
        said = (folder / SAID).read_text() if (folder / SAID).exists() else ""
        if f"\n{step} training" in said:
            break
        time.sleep(0.001)
    time.sleep(delay_s)
    victim.kill()
    victim.join()


@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_change_no_bit(
    planned: Path, expected: str, tmp_path: Path, seed: int
) -> None:
    folder, draw = copy(planned, tmp_path), random.Random(seed)
    for low, high in ((1, 8), (9, 16), (17, 24)):
        killed_after(folder, draw.randint(low, high), draw.uniform(0, 0.03))
    assert finish(folder) == expected


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    operations, finished = 0, False
    while not finished:
        folder = tmp_path / str(operations)
        folder.mkdir()
        victim = start(train_victim.saving, folder, operations)
        victim.join(60)
        finished = victim.exitcode == 0
        found, _ = checkpoint.newest(folder, "me")
        assert found is not None and found.best is not None, operations
        assert found.step == 2 if finished else found.step in (1, 2)
        assert float(found.tensors["weight:a"][0]) == found.step == float(found.best["weight:a"][0])
        lines = artifacts.read_jsonl(folder / "curve.jsonl")
        assert lines == [{"step": step} for step in range(1, found.step + 1)]
        train_victim.save(folder, found.step + 1)  # what the kill left behind is in nobody's way
        again, _ = checkpoint.newest(folder, "me")
        assert again is not None and again.step == found.step + 1
        operations += 1
    assert operations > 15
