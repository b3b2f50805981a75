"""The file of prompts and answers: whole lines, its owner's alone, and never in the way."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from luthier.errors import ServeError
from luthier.serving import transcript
from luthier.serving.transcript import FILES, Page, Transcript
from luthier.serving.worker import End, Pooled, Reason, Said
from luthier.store import RequestRecord


def record(**more: Any) -> RequestRecord:
    given = {
        "at": "2026-11-25T00:00:00.000+00:00", "release": "ab" * 32, "model": "guard", "status": 200,
        "prompt_tokens": 3, "completion_tokens": 2, "first_token_s": 0.1, "total_s": 0.2, "error": None,
        "key_id": "key_1", "tenant": "acme",
    }  # fmt: skip
    return RequestRecord(**(given | more))


def page(prompt: str, answer: str = "") -> Page:
    made = Page("req_1", "/v1/completions", json.dumps({"prompt": prompt}).encode())
    made.hear(0, Said(5, answer))
    made.hear(0, End(Reason.LENGTH, ""))
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_line_holds_request_and_answers_without_keys(tmp_path: Path) -> None:
    with Transcript(tmp_path, served="my own served key") as kept:
        made = page("¿qué tal? my key is lt-" + "A" * 43, "it is")
        made.hear(1, Said(6, "cut o"))  # a client that left before its second answer's end
        kept.keep(made, record())
        embedded = Page("req_2", "/v1/embeddings", b'{"input": "my own served key"}')
        embedded.hear(0, Pooled((0.5, 0.5)))
        embedded.hear(0, End(Reason.STOP, ""))
        kept.keep(embedded, record(status=200))
        kept.keep(Page("req_3", "/v1/completions", b"{}"), record(status=429))  # got no answer
    first, second = lines(kept.path)
    assert first["answers"] == [
        {"text": "it is", "finish_reason": "length"},
        {"text": "cut o", "finish_reason": None},
    ]
    assert first["request"] == {"prompt": "¿qué tal? my key is lt-…"} and first["tenant"] == "acme"
    assert (second["id"], second["answers"]) == ("req_2", [])
    mode = [stat.S_IMODE(path.stat().st_mode) for path in (kept.path, kept.path.parent)]
    assert mode == [0o600, 0o700] and kept.lost == 0


def test_a_full_file_makes_way_and_the_oldest_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcript, "BYTES", 2000)
    with Transcript(tmp_path) as kept:
        for n in range(40):
            kept.keep(page(f"prompt {n}"), record())
    files = sorted(kept.path.parent.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == FILES and all(path.stat().st_size <= 2000 for path in files)
    told = [line["request"]["prompt"] for path in files for line in lines(path)]
    assert told == [f"prompt {n}" for n in range(40 - len(told), 40)]
    with Transcript(tmp_path) as again:  # a new server goes on in the same file
        again.keep(page("later"), record())
    assert lines(kept.path)[-1]["request"]["prompt"] == "later"


def test_a_full_disk_loses_lines_but_no_line_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, full = os.write, [True]

    def half_then_full(file: int, data: bytes) -> int:
        if not full[0]:
            return write(file, data)
        if len(data) > 20:
            return write(file, bytes(data)[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Transcript(tmp_path) as kept:
        kept.keep(page("before"), record())
        while not kept.path.stat().st_size:
            pass
        monkeypatch.setattr(transcript.os, "write", half_then_full)
        kept.keep(page("lost"), record())
        while not kept.failing:
            pass
        full[0] = False
        kept.keep(page("after"), record())
    assert [line["request"]["prompt"] for line in lines(kept.path)] == ["before", "after"]
    assert kept.lost == 1 and not kept.failing


@pytest.mark.parametrize(
    "more", ["[" * 800 + "]" * 800, "9" * 5000, "NaN", '{"a": ' * 3000 + "1" + "}" * 3000]
)
def test_no_request_is_kept_out_by_the_way_it_is_written(tmp_path: Path, more: str) -> None:
    hostile = page("said")
    hostile.asked = f'{{"prompt": "secret lt-{"A" * 43}", "metadata": {more}}}'.encode()
    with Transcript(tmp_path) as kept:
        kept.keep(hostile, record())
        kept.keep(page("after"), record())
    first, second = lines(kept.path)
    assert first["request"].startswith('{"prompt": "secret lt-…", "metadata": ')
    assert second["request"]["prompt"] == "after" and kept.lost == 0


def test_where_it_cannot_write_the_server_does_not_start(tmp_path: Path) -> None:
    with Transcript(tmp_path), pytest.raises(ServeError, match="another server"), Transcript(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ServeError, match="prompts cannot be logged"), Transcript(tmp_path / "file"):
        pass
    elsewhere = tmp_path / "other" / "prompts"
    elsewhere.mkdir(parents=True)
    (elsewhere / "requests.jsonl").symlink_to(tmp_path / "file")
    with pytest.raises(ServeError, match="prompts cannot be logged"), Transcript(tmp_path / "other"):
        pass
