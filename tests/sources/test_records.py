from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from luthier.errors import DataError
from luthier.sources import _records

QUIET = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


def rows(path: Path, name: str | None = None) -> list[tuple[dict[str, Any], str]]:
    return list(_records.read(path, name or path.name))


def write(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


@QUIET
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_csv_gives_back_what_was_written(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, quoting=csv.QUOTE_ALL).writerows([("text", "label"), *cells])
    assert [tuple(record.values()) for record, _ in rows(tmp_path / "a.csv")] == cells


def test_a_place_is_the_line_where_a_record_begins(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b'\xef\xbb\xbftext,label\n"two\nlines",1\nlast,0\n')
    assert rows(path, "pkg/a.csv") == [
        ({"text": "two\nlines", "label": "1"}, "pkg/a.csv:2"),
        ({"text": "last", "label": "0"}, "pkg/a.csv:4"),
    ]
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n{"a": 2}')
    assert [where for _, where in rows(path)] == ["a.jsonl:1", "a.jsonl:3"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{oops}", "not JSON"),
        (b"[1]", "must be an object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "infinite"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"b": {"a": 1, "a": 2}}', "'a' stands twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": "\x00"}', "NUL"),
        (b'{"a": ' + b"[" * 40 + b"]" * 40 + b"}", "nested deeper"),
        (b"[" * 90_000, "nested deeper"),
        (b"[" * 200_000, "more than 100000 values"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_malformed_line_of_jsonl_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(DataError, match=words) as caught:
        rows(path)
    assert caught.value.where == "a.jsonl:2"


@pytest.mark.parametrize(
    ("data", "where", "words"),
    [
        (b"a,b\n1,2\n1\n", "a.csv:3", "1 fields, but the header names 2"),
        (b"a,b\n1,2,3\n", "a.csv:2", "3 fields"),
        (b"a,a\n1,2\n", "a.csv:1", "repeated column"),
        (b"a,\n1,2\n", "a.csv:1", "empty or repeated"),
        (b'a,b\n1,2\n"open,2\n3,4\n', "a.csv:3", "not CSV"),
        (b'a,b\n"x"y,2\n', "a.csv:2", "not CSV"),
        (b"a,b\n1,\xe9\n", "a.csv:2", "not UTF-8"),
        (b"a,b\r1,2\r", "a.csv:1", "not CSV"),
    ],
)
def test_a_malformed_line_of_csv_is_named(tmp_path: Path, data: bytes, where: str, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        rows(write(tmp_path, "a.csv", data))
    assert caught.value.where == where


def test_a_line_has_a_largest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_records, "LINE_BYTES", 64)
    path = write(tmp_path, "a.jsonl", json.dumps({"a": "x" * 80}).encode())
    with pytest.raises(DataError, match="longer than"):
        rows(path)


def test_a_csv_field_may_be_longer_than_the_csv_modules_default(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b"text\n" + b"x" * 200_000 + b"\n")
    assert len(rows(path)[0][0]["text"]) == 200_000


def test_parquet_gives_records_with_nested_messages_and_refuses_what_is_no_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(
        pyarrow.table({"messages": [messages, messages], "n": [1.5, 2.0]}), tmp_path / "a.parquet"
    )
    assert rows(tmp_path / "a.parquet")[1] == ({"messages": messages, "n": 2.0}, "a.parquet:2")
    parquet.write_table(pyarrow.table({"n": [1.0, float("nan")]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match="NaN") as caught:
        rows(tmp_path / "n.parquet")
    assert caught.value.where == "n.parquet:2"
    with pytest.raises(DataError, match="not Parquet"):
        rows(write(tmp_path, "b.parquet", b"PAR1 nonsense"))


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown format '.xlsx'") as caught:
        rows(write(tmp_path, "a.xlsx", b""))
    assert ".jsonl" in (caught.value.hint or "")
