"""Records out of files: JSONL, CSV and Parquet, one dictionary a record, each with its place `name:line`.

Sources: JSON Lines with RFC 8259 (UTF-8, no NaN, no key twice), RFC 4180 (CSV with a header), Apache Parquet.
Nothing is skipped and nothing is guessed: a line that does not parse stops the run and is named. Blank
lines of JSONL and a byte-order mark are tolerated. Size and depth are bounded, so a hostile file is an
error and not an outage.
This module does not know conversations, splits or sources.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier.errors import DataError

LINE_BYTES = 16 * 1024 * 1024
DEPTH = 32
VALUES = 100_000  # of one line: lists, objects and what is between their commas
BLANKS = 10_000  # lines of one file
SIGNS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"PK\x03\x04": "a zip file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"PAR1": "a Parquet file",
}
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
Record = dict[str, Any]


def read(path: Path, name: str) -> Iterator[tuple[Record, str]]:
    """Records of the file at `path`, called `name` in places and errors; its suffix says the format."""
    suffix = Path(name).suffix.lower()
    reader = READERS.get(suffix)
    if reader is None:
        raise DataError(f"unknown format {suffix!r}", where=name, hint=f"known: {', '.join(READERS)}")
    try:
        yield from reader(path, name)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=name) from error


def scan(path: Path, name: str, most_bytes: int | None = None) -> Iterator[tuple[int, Record | DataError]]:
    """Every line of a JSONL file that is not blank: its number, and its record or what is wrong with it.

    For whoever lists all faults; a file that is not text, or mostly blank, ends with its first one. Reads no
    line that begins after `most_bytes`.
    """
    blank = 0
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LINE_BYTES + 1), b""), 1):
            where = f"{name}:{number}"
            found: Record | DataError | None
            try:
                text = _text(line, number, where)
                found = _record(text, where) if text.strip() else None
            except DataError as error:
                found = error
            if found is not None:
                yield number, found
            elif (blank := blank + 1) > BLANKS:
                yield number, DataError(f"more than {BLANKS} lines are blank", where=where)
            if isinstance(found, NotText) or blank > BLANKS:
                return
            if most_bytes is not None and stream.tell() >= most_bytes:
                return
            if len(line) > LINE_BYTES:  # the rest of it is no line of its own
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LINE_BYTES)


class NotText(DataError):
    """The file is of another kind altogether; its other lines would say nothing."""


def _text(line: bytes, number: int, where: str) -> str:
    """A line decoded, the byte-order mark removed; its length bounded."""
    if number == 1:
        kind = next((kind for sign, kind in SIGNS.items() if line.startswith(sign)), None)
        if kind is not None:
            hint = "unpack the file, or save it as UTF-8"
            raise NotText(f"this is {kind}, not lines of UTF-8 text", where=where, hint=hint)
        line = line.removeprefix(b"\xef\xbb\xbf")
    if len(line) > LINE_BYTES:
        raise DataError(f"the line is longer than {LINE_BYTES // 2**20} MiB", where=where)
    if b"\0" in line:
        raise NotText("the line holds a NUL byte; is this a text file?", where=where)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 at byte {error.start + 1} of the line", where=where, hint="save the file as UTF-8"
        ) from error


def _lines(path: Path, name: str) -> Iterator[str]:
    """Lines with their ends, decoded; length bounded."""
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LINE_BYTES + 1), b""), 1):
            yield _text(line, number, f"{name}:{number}")


def _jsonl(path: Path, name: str) -> Iterator[tuple[Record, str]]:
    for number, found in scan(path, name):
        if isinstance(found, DataError):
            raise found
        yield found, f"{name}:{number}"


def _record(line: str, where: str) -> Record:
    """One line's object. How many values it holds is counted before they are made: each costs memory."""
    if sum(map(line.count, "[{,")) > VALUES and sum(map(_STRING.sub("", line).count, "[{,")) > VALUES:
        raise DataError(f"the line holds more than {VALUES} values", where=where)
    try:
        record = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=where) from error
    except RecursionError as error:
        raise DataError(f"nested deeper than {DEPTH}", where=where) from error
    except ValueError as error:
        long = "integer string conversion" in str(error)
        raise DataError(f"not JSON: {'a number is too long' if long else error}", where=where) from error
    found = _object(record, where)
    if "\\u" in line:
        _whole_letters(found, where)
    return found


def _whole_letters(record: Any, where: str) -> None:
    """An escape can spell half a letter (a lone surrogate), which no file can hold as UTF-8."""
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError("the text holds a lone surrogate, which is not valid Unicode", where=where) from None


def _no_key_twice(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return record


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_key_twice, parse_constant=_no_constant)


def _csv(path: Path, name: str) -> Iterator[tuple[Record, str]]:
    csv.field_size_limit(LINE_BYTES)  # the module's only setting is global; its default is 128 KiB
    reader = csv.reader(_lines(path, name), strict=True)
    columns: list[str] | None = None
    start = 1
    while True:
        where = f"{name}:{start}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"not CSV: {error}", where=where, hint="quote fields that hold quotes or ends of line"
            ) from error
        start = reader.line_num + 1
        if columns is None:
            columns = _header(fields, where)
        elif len(fields) == len(columns):
            yield dict(zip(columns, fields, strict=True)), where
        elif fields:
            raise DataError(f"{len(fields)} fields, but the header names {len(columns)} columns", where=where)


def _header(fields: list[str], where: str) -> list[str]:
    columns = [field.strip() for field in fields]
    if not all(columns) or len(set(columns)) < len(columns):
        raise DataError(f"the header has an empty or repeated column: {columns}", where=where)
    return columns


def _parquet(path: Path, name: str) -> Iterator[tuple[Record, str]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise DataError(f"a column stands twice: {columns}", where=name)
        for batch in file.iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                number += 1
                where = f"{name}:{number}"
                yield _object(record, where), where
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"not Parquet: {str(error).splitlines()[0]}", where=f"{name}:{number + 1}") from error


def _object(record: Any, where: str) -> Record:
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, this is a {type(record).__name__}", where=where)
    _bounded(record, where)
    return record


def _bounded(record: Record, where: str) -> None:
    """Refuse what is nested too deep, and numbers that are not numbers."""
    level: list[Any] = [record]
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise DataError("a number is NaN or infinite", where=where)
        if not below:
            return
        level = below
    raise DataError(f"nested deeper than {DEPTH}", where=where)


READERS: dict[str, Callable[[Path, str], Iterator[tuple[Record, str]]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}
