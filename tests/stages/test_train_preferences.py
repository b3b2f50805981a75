"""Training on pairs: it begins at log 2, the preference is learnt, and a stop or a damaged reference
changes no byte."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import artifacts
from luthier.errors import DataError, Interrupted
from luthier.rows import pair
from luthier.sources import _form
from luthier.stages import Event, Inputs
from tests.stages.test_train import run, with_plan
from tests.stages.training import world

DPO: dict[str, Any] = {"objective": {"name": "dpo", "beta": 0.1}, "steps": 8, "lr": 1e-2}


def preferences(count: int, seed: int) -> list[dict[str, Any]]:
    rows = []
    for n in range(count):
        asked = [{"role": "user", "content": f"{seed} question {n}, at some length"}]
        sides = [[{"role": "assistant", "content": text}] for text in ("certainly yes", "no way")]
        rows.append(pair(asked, sides[0], sides[1], f"rows:{n + 1}").as_record())
    return rows


def pairs(folder: Path, base: Path) -> Inputs:
    inputs = world(folder, base)
    data = folder / "pairs"
    for split, rows in (("train", preferences(20, 1)), ("validation", preferences(6, 2)), ("test", [])):
        (data / "rows").mkdir(parents=True, exist_ok=True)
        artifacts.write_jsonl(data / "rows" / f"{split}.jsonl", rows)
    digests = {**inputs.digests, "data": artifacts.seal(data)}
    return replace(inputs, artefacts={**inputs.artefacts, "data": data}, digests=digests)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Inputs:
    folder = tmp_path_factory.mktemp("pairs")
    return with_plan(pairs(folder, tiny_base), folder, **DPO)


@pytest.fixture(scope="module")
def whole(planned: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder / "out", *run(planned, folder, **DPO)


def test_it_begins_at_log_two_and_learns_the_preference(whole: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, facts = whole
    curve = artifacts.read_jsonl(out / "curve.jsonl")
    looks = artifacts.read_jsonl(out / "validation.jsonl")
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert looks[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and looks[0]["margin"] == 0
    assert looks[-1]["loss"] < looks[0]["loss"] and looks[-1]["preferred"] == 1
    assert curve[-1]["margin"] > 0 and "chosen_logp" in curve[-1]
    ledger = artifacts.read_jsonl(out / "ledger.jsonl")
    assert all(len(entry["rows"]) == len(set(entry["rows"])) == 4 for entry in ledger)
    assert facts["computed_tokens"] < facts["useful_tokens"]  # the prompt of a pair is computed once


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_stop_changes_no_byte_even_where_the_reference_was_lost_or_damaged(
    planned: Inputs, whole: tuple[Path, str, dict[str, Any]], tmp_path: Path, after: int
) -> None:
    seen: list[int] = []

    def tell(event: Event) -> None:
        if "loss" in event.facts:
            seen.append(event.done or 0)

    with pytest.raises(Interrupted):
        run(replace(planned, tell=tell, stopping=lambda: len(seen) >= after), tmp_path, **DPO)
    (kept,) = (tmp_path / "scratch" / "reference").glob("*.safetensors")
    if after == 4:
        kept.unlink()
    if after == 6:
        kept.write_bytes(kept.read_bytes()[:-4] + b"torn")
    assert run(planned, tmp_path, **DPO)[0] == whole[1]


def test_preferences_are_read_as_openai_writes_them_and_from_columns() -> None:
    asked = [{"role": "user", "content": "hi"}]
    sides = [[{"role": "assistant", "content": text}] for text in ("hello", "go away")]
    line = {"input": {"messages": asked}, "preferred_output": sides[0], "non_preferred_output": sides[1]}
    form = _form.Form("{q}", "{good}", None, {}, "{bad}")
    found = [
        _form.read(line, None, "a:1", "Pair"),
        _form.read({"prompt": asked, "chosen": sides[0], "rejected": sides[1]}, None, "a:1", "Pair"),
        _form.read({"q": "hi", "good": "hello", "bad": "go away"}, form, "a:1", "Pair"),
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ({"messages": [{"role": "user", "content": "a"}]}, "Pair", "no preference"),
        ({"input": "a", "preferred_output": [], "non_preferred_output": []}, "Pair", "must be an object"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "Chat", "has no `messages`"),
    ],
)
def test_rows_of_another_kind_are_refused_with_their_line(
    record: dict[str, Any], kind: str, words: str
) -> None:
    with pytest.raises(DataError, match=words) as caught:
        _form.read(record, None, "rows.jsonl:3", kind)
    assert caught.value.where is not None and caught.value.where.startswith("rows.jsonl:3")
