"""Artefacts under kill -9 and a full disk: the old file or the new one, never a half; and a clear word."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luthier import artifacts
from luthier.errors import StoreError
from tests.faults import small_disk

BIG = os.urandom(400_000)


def test_a_full_disk_leaves_the_old_file_no_half_file_and_a_hint(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", size_kb=512) as disk:
        artifacts.write_bytes(disk / "a", b"old")
        with pytest.raises(
            StoreError, match=r"disk/a: cannot write it: No space left[\s\S]*the disk is full"
        ):
            artifacts.write_bytes(disk / "a", BIG + BIG)
        with pytest.raises(StoreError, match="the disk is full"):
            artifacts.write_jsonl(disk / "rows.jsonl", ({"text": "x" * 1000} for _ in range(1000)))
        assert os.listdir(disk) == ["a"] and (disk / "a").read_bytes() == b"old"
        artifacts.write_bytes(disk / "a", BIG)
        assert (disk / "a").read_bytes() == BIG, "once there is room, the same write works"


def test_a_full_disk_while_sealing_leaves_no_manifest(tmp_path: Path) -> None:
    with small_disk.mounted(tmp_path / "disk", size_kb=512) as disk:
        (disk / "out").mkdir()
        (disk / "out/weights").write_bytes(BIG)
        filler = disk / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(StoreError, match="the disk is full"):
            artifacts.seal(disk / "out")
        assert os.listdir(disk / "out") == ["weights"]
        filler.unlink()
        assert artifacts.seal(disk / "out") == artifacts.verify(disk / "out")


def test_a_full_disk_while_copying_is_named(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/weights").write_bytes(BIG + BIG)
    with (
        small_disk.mounted(tmp_path / "disk", size_kb=512) as disk,
        pytest.raises(StoreError, match="the disk is full"),
    ):
        artifacts.link_tree(tmp_path / "src", disk / "dst")


LIMITED = """
import os, resource, sys
from pathlib import Path
from luthier import artifacts
from luthier.errors import StoreError
folder = Path(sys.argv[1])
artifacts.write_bytes(folder / "a", b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    artifacts.write_bytes(folder / "a", b"x" * 100_000)
except StoreError as error:
    print(error)
print(os.listdir(folder), (folder / "a").read_bytes())
"""


def test_a_file_size_limit_is_named_and_leaves_the_old_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path], capture_output=True, text=True, check=True
    )
    assert "/a: cannot write it: File too large" in done.stdout and "ulimit -f" in done.stdout
    assert done.stdout.endswith("['a'] b'old'\n")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_late_still_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    artifacts.write_bytes(tmp_path / "a", b"old")

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as broken:
        broken.setattr(os, step, fail)
        with pytest.raises(StoreError, match=r"a: cannot write it: .*\n  → the disk"):
            artifacts.write_bytes(tmp_path / "a", b"new")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


WRITER = """
import sys
from pathlib import Path
from luthier import artifacts
folder = Path(sys.argv[1])
for n in range(100_000):
    artifacts.write_bytes(folder / "a", bytes([n % 251]) * 300_000)
    print(n, flush=True)
"""


def test_kill_nine_while_writing_leaves_one_whole_version(tmp_path: Path) -> None:
    moment = random.Random(17)
    for _ in range(6):
        last = _run_and_kill(WRITER, tmp_path, moment.uniform(0.0, 0.2))
        content = (tmp_path / "a").read_bytes()
        assert len(content) == 300_000 and len(set(content)) == 1
        assert content[0] in (last % 251, (last + 1) % 251), "the acknowledged version, or the one just begun"
        artifacts.seal(tmp_path)
        assert sorted(os.listdir(tmp_path)) == ["a", "manifest.json"], "sealing removes a killed write's temp"


SEALER = """
import sys
from pathlib import Path
from luthier import artifacts
root = Path(sys.argv[1])
for n in range(100_000):
    out = root / "work" / str(n)
    for m in range(5):
        artifacts.write_bytes(out / f"deep/{m}", bytes([m]) * 50_000 + str(n).encode())
    artifacts.publish(out, root / "artifacts" / artifacts.seal(out))
    print(n, flush=True)
"""


def test_kill_nine_while_sealing_and_publishing_leaves_only_whole_artefacts(tmp_path: Path) -> None:
    moment = random.Random(17)
    for life in range(5):
        root = tmp_path / str(life)
        last = _run_and_kill(SEALER, root, moment.uniform(0.0, 0.3))
        published = list((root / "artifacts").iterdir())
        assert len(published) in (last + 1, last + 2)
        assert all(artifacts.verify(folder) == folder.name for folder in published)


def _run_and_kill(program: str, folder: Path, after_s: float) -> int:
    """Kill the program some time after its first acknowledgement; the number it acknowledged last."""
    child = subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline()
    time.sleep(after_s)
    child.send_signal(signal.SIGKILL)
    lines = (first + child.stdout.read()).splitlines(keepends=True)
    child.wait()
    return int([line for line in lines if line.endswith("\n")][-1])
