"""A save that meets a full or broken disk: the checkpoint before it loads, and the message names the file."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from luthier.engine import checkpoint
from luthier.engine.saver import Saver
from luthier.errors import StoreError
from tests.faults import small_disk
from tests.faults.failing_disk import Disk, error, failing
from tests.faults.train_victim import made


def loads(folder: Path) -> int:
    found, _ = checkpoint.newest(folder, "me")
    assert found is not None
    assert float(found.tensors["weight:a"].unique()) == found.step
    assert found.journals == made(found.step).journals
    return found.step


@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_or_a_torn_write_at_any_file_operation_leaves_a_checkpoint_and_names_a_file(
    tmp_path: Path, code: int, lasting: bool
) -> None:
    at, refused = 0, 0
    while True:
        folder = tmp_path / str(at)
        checkpoint.save(folder, made(1))
        disk = Disk(at, error(code), lasting)
        try:
            with failing(disk):
                checkpoint.save(folder, made(2))
        except StoreError as told:
            refused += 1
            assert told.where is not None and told.where.startswith(str(folder)), told
            assert loads(folder) in (1, 2)  # 2: all was written, only the last fsync or clearing up failed
        else:
            assert loads(folder) == 2, "what reports no error is on disk"
        assert loads(folder) == 2 or disk.failed
        checkpoint.save(folder, made(3))  # the disk is well again: nothing is in the way
        assert loads(folder) == 3
        assert not list(folder.glob("partial-*"))
        if not disk.failed:
            break
        at += 1
    assert refused > 25


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before_and_says_so(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", size_kb=256) as disk:
        folder, filler = disk / "checkpoints", disk / "filler"
        checkpoint.save(folder, made(1))
        refused = 0
        for free_kb in range(0, 64, 4):
            filler.unlink(missing_ok=True)
            with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            with open(filler, "r+b") as file:
                file.truncate(filler.stat().st_size - 1024 * free_kb)
            try:
                checkpoint.save(folder, made(2))
            except StoreError as told:
                refused += 1
                assert loads(folder) == 1
                assert told.where is not None and told.where.startswith(str(folder))
                assert "the disk is full" in str(told) or "No space left" in str(told)
            else:
                break
        assert refused >= 2 and loads(folder) == 2


def test_an_error_aside_comes_up_at_the_next_look_with_its_file(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        saver.begin(made(1), {})
        assert saver.ended(wait=True) is not None
        with failing(Disk(2, error(errno.EIO))):
            saver.begin(made(2), {})
            while saver.busy():
                pass
            with pytest.raises(StoreError, match=f"{tmp_path}.*"):
                saver.ended()
        saver.begin(made(3), {})
    assert loads(tmp_path) == 3


def test_an_error_in_the_last_save_is_not_lost_when_nobody_looks(tmp_path: Path) -> None:
    full = failing(Disk(2, error(errno.ENOSPC)))
    with full, pytest.raises(StoreError, match="No space left"), Saver(tmp_path) as saver:
        saver.begin(made(1), {})
