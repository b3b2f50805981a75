"""kill -9 at random moments of training, inside saves too, and SIGTERM: the end is the uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from luthier import artifacts
from luthier.engine import batch, checkpoint
from luthier.stages import plan
from tests.faults import train_victim
from tests.faults.train_victim import ASKED, DIGEST, SAID, STEPS
from tests.stages.training import PHASE, SEED, planning, world


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


def wait_for(folder: Path, victim: Any, word: str, times: int = 1) -> None:
    """Until the victim has said it so often since `SAID` was removed, or is gone."""
    while victim.is_alive():
        if (folder / SAID).exists() and (folder / SAID).read_text().count(word) >= times:
            return
        time.sleep(0.001)


def one_life(folder: Path, draw: random.Random) -> bool:
    """A training that is killed, at a file operation or by the clock. False if it got through."""
    (folder / SAID).unlink(missing_ok=True)
    if draw.random() < 0.5:
        victim = start(train_victim.training, folder, draw.randrange(180))
    else:
        victim = start(train_victim.training, folder)
        wait_for(
            folder, victim, " training\n", draw.randint(1, 8)
        )  # steps: a slow machine is killed as far on
        time.sleep(draw.uniform(0, 0.02))
        victim.kill()
    victim.join(120)
    assert victim.exitcode in (0, -signal.SIGKILL)
    return bool(victim.exitcode)


def half_written(folder: Path) -> set[tuple[str, int]]:
    found = (folder / "scratch" / "checkpoints").glob("partial-*")
    return {(path.name, path.stat().st_mtime_ns) for path in found}


def every_row_once(folder: Path) -> bool:
    """The ledger holds the rows that the seed gives to each step, step by step."""
    ids = tuple(row["id"] for row in artifacts.read_jsonl(folder / "data" / "rows" / "train.jsonl"))
    due = [
        (step, sorted(ids[row] for row in batch.rows_of(ids, PHASE["batch"], SEED, step)))
        for step in range(1, STEPS["steps"] + 1)
    ]
    ledger = artifacts.read_jsonl(folder / "out" / "ledger.jsonl")
    return [(entry["step"], sorted(entry["rows"])) for entry in ledger] == due


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [40, pytest.param(200, marks=pytest.mark.long)])
def test_kills_at_random_moments_and_inside_saves_change_no_bit(
    planned: Path, expected: str, tmp_path: Path, kills: int
) -> None:
    draw, done, inside, trainings = random.Random(kills), 0, 0, 0
    while done < kills:
        folder = copy(planned, tmp_path / str(trainings))
        trainings += 1
        while done < kills and not (folder / DIGEST).exists():
            before = half_written(folder)
            done += one_life(folder, draw)
            inside += bool(half_written(folder) - before)
        assert finish(folder) == expected
        assert every_row_once(folder)
        shutil.rmtree(folder)
    assert inside >= kills // 8 and trainings >= 2


def test_a_kill_at_any_file_operation_of_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    operations, finished = 0, False
    while not finished:
        folder = tmp_path / str(operations)
        folder.mkdir()
        victim = start(train_victim.saving, folder, operations)
        victim.join(60)
        finished = victim.exitcode == 0
        found, _ = checkpoint.newest(folder, "me")
        assert found is not None, operations
        assert found.step == 2 if finished else found.step in (1, 2)
        assert float(found.tensors["weight:a"][0]) == found.step
        assert found.journals == train_victim.made(found.step).journals
        checkpoint.save(folder, train_victim.made(found.step + 1))  # what it left is in nobody's way
        again, _ = checkpoint.newest(folder, "me")
        assert again is not None and again.step == found.step + 1
        operations += 1
    assert operations > 15


@pytest.mark.parametrize("seed", range(4))
def test_sigterm_in_training_saves_all_that_was_done_and_is_gone_in_ten_seconds(
    planned: Path, expected: str, tmp_path: Path, seed: int
) -> None:
    folder, draw = copy(planned, tmp_path), random.Random(seed)
    victim = start(train_victim.stoppable, folder)
    wait_for(folder, victim, f"\n{draw.randint(1, 8)} training\n")
    time.sleep(draw.uniform(0, 0.02))
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGTERM)
    victim.join(30)
    assert time.monotonic() - began <= 10 and victim.exitcode == ASKED
    done = [line for line in (folder / SAID).read_text().splitlines() if line.endswith(" training")]
    saved = max((folder / "scratch" / "checkpoints").glob("step-*"))
    assert saved.name == f"step-{int(done[-1].split()[0]):08d}" and artifacts.verify(saved)
    assert finish(folder) == expected
