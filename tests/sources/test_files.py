from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.errors import FetchError
from luthier.sources import files


def silent(message: str, done: int | None, total: int | None) -> None:
    del message, done, total


def test_relative_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    params = files.Params(files={"train": "a.csv"})
    assert files.fetch(params, tmp_path, tmp_path / "cache", silent) == {"train": tmp_path / "a.csv"}


def test_one_changed_byte_or_name_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "a").write_bytes(b"1")
    params = files.Params(files={"model": "base"})
    seen = {files.fingerprint(params, tmp_path)["model"]}
    (folder / "a").write_bytes(b"2")
    seen.add(files.fingerprint(params, tmp_path)["model"])
    (folder / "a").rename(folder / "b")
    seen.add(files.fingerprint(params, tmp_path)["model"])
    assert len(seen) == 3


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    params = files.Params(files={"train": "no.csv"})
    for call in (
        lambda: files.fingerprint(params, tmp_path),
        lambda: files.fetch(params, tmp_path, tmp_path, silent),
    ):
        with pytest.raises(FetchError, match="no such file") as caught:
            call()
        assert caught.value.where == str(tmp_path / "no.csv")


def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.csv")
    with pytest.raises(FetchError, match="a pipe"):
        files.fingerprint(files.Params(files={"train": "rows.csv"}), tmp_path)
