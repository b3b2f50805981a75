"""Training files: what each kind of line must be, every fault by its line, hostile files in bounded work."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from luthier import training_file
from luthier.training_file import Bounds, Kind, check

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": ""}
SYSTEM = {"role": "system", "content": "be kind"}
CHAT = {"messages": [USER, ANSWER]}
PAIR = {
    "input": {"messages": [USER]},
    "preferred_output": [ANSWER],
    "non_preferred_output": [{"role": "assistant", "content": "go away"}],
}
TASK = {"messages": [USER], "reference_answer": "hi"}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (CHAT, Kind.CHAT),
        ({"messages": [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, ANSWER]}, Kind.CHAT),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "hi"}]}]}, Kind.CHAT),
        (
            {
                "messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, RESULT, ANSWER],
                "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
            },
            Kind.CHAT,
        ),
        (PAIR, Kind.PREFERENCE),
        (TASK, Kind.REINFORCEMENT),
    ],
)  # fmt: skip
def test_each_form_that_openai_documents_is_taken_for_what_it_is(
    tmp_path: Path, line: Any, kind: Kind
) -> None:
    found = check(write(tmp_path, line, b"", line), Bounds())
    assert (found.faults, found.examples, found.kinds, found.whole) == ([], 2, {kind}, True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a", "completion": "b"}, "`messages` is missing (keys: 'prompt', 'completion')"),
        ({"messages": []}, "`messages` must be a list that is not empty"),
        ({"messages": [USER]}, "it must be the assistant's"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        ({"messages": [USER, {**ANSWER, "weigth": 0}]}, "did you mean 'weight'?"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "`messages[1].weight` is 0 or 1"),
        ({"messages": [{**USER, "weight": 1}, ANSWER]}, "`messages[0].weight` is 0 or 1"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing is learnt"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages[1].content` must be text"),
        ({"messages": [{"role": "user", "content": " "}, ANSWER]}, "`messages[0].content` is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "only text is learnt"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "tool_call_id` is missing"),
        ({**CHAT, "tool": []}, "did you mean 'tools'?"),
        ({**CHAT, "tools": [{}]}, "`tools[0]` must be"),
        ({**PAIR, "preferred_output": []}, "`preferred_output` must be a list that is not empty"),
        ({**PAIR, "preferred_output": [USER]}, "one message of the assistant's"),
        ({**PAIR, "non_preferred_output": [ANSWER]}, "are the same"),
        ({"input": {"messages": [USER]}, "preferred_output": [ANSWER]}, "`non_preferred_output` is missing"),
        ({**PAIR, "input": {"messages": [USER, ANSWER]}}, "the outputs answer it"),
        ([1], "must be an object"),
    ],
)  # fmt: skip
def test_a_bad_line_is_told_by_its_number_counted_from_one(tmp_path: Path, line: Any, words: str) -> None:
    good = PAIR if isinstance(line, dict) and "preferred_output" in line else CHAT
    found = check(write(tmp_path, good, b"", line, good), Bounds())
    assert len(found.faults) == 1
    assert found.faults[0].startswith("line 3: ") and words in found.faults[0], found.faults
    assert found.examples == 2


def test_another_kind_than_the_first_line_or_the_wanted_one_is_a_fault(tmp_path: Path) -> None:
    mixed = check(write(tmp_path, CHAT, PAIR), Bounds())
    assert mixed.faults[0].startswith("line 2: `messages`")
    wanted = check(write(tmp_path, CHAT), Bounds(kind=Kind.PREFERENCE))
    assert wanted.faults[0].startswith("line 1: `messages`: unknown key 'messages' (known: input, preferred")


def test_only_the_first_ten_faults_are_listed_and_the_error_holds_them_all(tmp_path: Path) -> None:
    found = check(write(tmp_path, CHAT, *[b"{oops}"] * 50), Bounds())
    assert [fault.split(":")[0] for fault in found.faults] == [f"line {n}" for n in range(2, 12)]
    assert not found.whole
    said = found.error("mine.jsonl")
    assert str(said).startswith("mine.jsonl: line 2: not JSON") and "line 11: " in said.what


def test_a_bounded_look_ends_early_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, *[CHAT] * 100, b"{oops}")
    found = check(path, Bounds(bytes=1000))
    assert found.faults == [] and not found.whole and 10 < found.examples < 30
    assert check(path, Bounds()).faults[0].startswith("line 101: ")


def test_an_example_longer_than_the_base_reads_is_a_fault_with_both_numbers(tmp_path: Path) -> None:
    def tokens(example: training_file.Example) -> int:
        return sum(len(str(message["content"])) for turns in example.conversations for message in turns)

    long = {"messages": [USER, {"role": "assistant", "content": "x" * 100}]}
    found = check(write(tmp_path, CHAT, long, CHAT), Bounds(tokens=tokens, context=50))
    assert found.faults == ["line 2: the example has 105 tokens, and the base reads 50"]
    assert (found.tokens, found.longest) == (7 + 105 + 7, 105)


BOMBS: dict[str, tuple[bytes, str]] = {
    "one line": (b"{" + b'"a": "' + b"x" * (20 << 20) + b'"}\n', "longer than 16 MiB"),
    "depth": (b"[" * 100_000 + b"\n", "nested deeper"),
    "objects in objects": (b'{"a":' * 100_000 + b"\n", "nested deeper"),
    "keys": (b"{" + b",".join(b'"k%d":1' % n for n in range(1_000_000)) + b"}\n", "more than 100000 values"),
    "empty lists": (b'{"a":[' + b"[]," * 3_000_000 + b"1]}\n", "more than 100000 values"),
    "long number": (b'{"a": ' + b"1" * (10 << 20) + b"}\n", "a number is too long"),
    "long fraction": (b'{"a": 1' + b"1" * (10 << 20) + b".5}\n", "NaN or infinite"),
    "surrogate": (b'{"messages": "\\ud800"}\n', "lone surrogate"),
    "byte-order mark": (b"\xff\xfe" + json.dumps(CHAT).encode("utf-16-le"), "UTF-16"),
    "key twice": (b'{"messages": 1, "messages": 2}\n', "stands twice"),
    "NaN": (b'{"messages": NaN}\n', "NaN is not a JSON value"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(1000), "a gzip file"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(1000), "a zstd file"),
    "blank": (b"\n" * 1_000_000, "more than 10000 lines are blank"),
    "nothing": (b"", "holds no example"),
}  # fmt: skip

MEASURED = """
import json, re, sys
from pathlib import Path
from luthier.training_file import Bounds, check
for name in sys.argv[1:]:
    found = check(Path(name), Bounds())
    # getrusage would tell the peak of whoever forked this process, too
    peak = int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps([name, found.faults, peak]), flush=True)
"""


def measured(folder: Path, names: list[str]) -> list[tuple[str, list[str], int]]:
    """Each file checked in one process of its own; with the peak of its memory so far, in KiB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *names], cwd=folder, capture_output=True, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_hostile_files_end_in_a_numbered_fault_within_256_megabytes(tmp_path: Path) -> None:
    for name, (data, _) in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    for name, faults, peak_kib in measured(tmp_path, list(BOMBS)):
        assert faults and faults[0].startswith("line "), name
        assert BOMBS[name][1] in faults[0], (name, faults[0])
        assert peak_kib < 256 * 1024, (name, peak_kib)


@pytest.mark.long
def test_a_gigabyte_line_and_ten_million_blank_ones_stay_within_256_megabytes(tmp_path: Path) -> None:
    with open(tmp_path / "line", "wb") as file:
        for _ in range(1024):
            file.write(b"x" * (1 << 20))
        file.write(b"\n{oops}\n")
    (tmp_path / "blank").write_bytes(b"\n" * 10_000_000)
    (line, blank) = measured(tmp_path, ["line", "blank"])
    assert "longer than 16 MiB" in line[1][0] and line[1][1].startswith("line 2: not JSON")
    assert "blank" in blank[1][0]
    assert max(line[2], blank[2]) < 256 * 1024
