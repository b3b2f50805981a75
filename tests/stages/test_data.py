from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier import artifacts
from luthier.errors import DataError, Interrupted
from luthier.recipe import Data, Split
from luthier.rows import Chat, chat
from luthier.stages import Event, Inputs, data

SPLITS = ("train", "validation", "test")


def row(prompt: str, answer: str, where: str = "a:1") -> Chat:
    return chat([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], where)


def inputs(tmp_path: Path, **changes: Any) -> Inputs:
    given: dict[str, Any] = {"name": "toy", "artefacts": {}, "digests": {}, "root": tmp_path, "seed": 17}
    given |= {"cache": tmp_path / "cache", "scratch": tmp_path / "scratch"}
    return Inputs(**(given | changes))


def section(files: dict[str, str], **changes: Any) -> Data:
    source = {"from": {"name": "files", "files": files}, "licence": "MIT", "purpose": "tests"}
    source["chat"] = {"user": "{text}", "assistant": "{label}"}
    split = changes.pop("split", {})
    dedup = changes.pop("dedup", "exact")
    return Data.model_validate({"sources": [source | changes], "split": split, "dedup": dedup})


def write(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    path.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in rows), "utf-8")


def read(out: Path, split: str) -> list[dict[str, Any]]:
    return list(artifacts.read_jsonl(out / "rows" / f"{split}.jsonl"))


ROWS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["yes", "no"])), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.sampled_from(["random", "stratified"]))
def test_splits_are_disjoint_and_do_not_depend_on_the_order_of_rows(
    pairs: list[tuple[int, str]], draw: random.Random, by: str
) -> None:
    rows = [row(f"q{n}", answer) for n, answer in pairs]
    shares = Split.model_validate({"validation": 0.2, "test": 0.2, "by": by})
    first = data.divide([{"all": rows}], shares, 17, dedup=True)
    shuffled = rows[:]
    draw.shuffle(shuffled)
    second = data.divide([{"train": shuffled}], shares, 17, dedup=True)
    for split in SPLITS:
        assert {r.id for r in first.rows[split]} == {r.id for r in second.rows[split]}
    prompts = [{r.prompt for r in first.rows[split]} for split in SPLITS]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == len({r.prompt for r in rows})
    kept = [r.id for split in SPLITS for r in first.rows[split]]
    assert sorted(kept) == sorted({r.id for r in rows})


def test_a_stratified_split_keeps_the_ratio_of_answers_and_the_shares() -> None:
    rows = [row(f"q{n}", "rare" if n % 10 == 0 else "common") for n in range(400)]
    found = data.divide([{"all": rows}], Split(validation=0.1, test=0.2), 17, dedup=True).rows
    assert [len(found[split]) for split in SPLITS] == [280, 40, 80]
    assert [sum(r.answer == "rare" for r in found[split]) for split in SPLITS] == [28, 4, 8]


def test_another_seed_is_another_split() -> None:
    rows = [row(f"q{n}", "x") for n in range(100)]
    seen = {
        tuple(r.id for r in data.divide([{"all": rows}], Split(), s, dedup=True).rows["test"])
        for s in (1, 2, 1)
    }
    assert len(seen) == 2


def test_declared_splits_stay_as_declared_and_leaks_are_dropped_from_the_lower_one() -> None:
    pool = {
        "train": [row("a", "1"), row("b", "1"), row("c", "2"), row("only", "1")],
        "validation": [row("b", "2"), row("v", "1")],
        "test": [row("c", "2"), row("t", "1"), row("t", "1")],
    }
    found = data.divide([pool], Split(), 17, dedup=True)
    assert [[r.prompt[0].content for r in found.rows[split]] for split in SPLITS] == [
        ["a", "only"],
        ["b", "v"],
        ["c", "t"],
    ]
    assert found.duplicates == 1 and found.leaks == {"train": 2, "validation": 0}
    assert len(found.contradictions) == 1


def test_only_what_a_source_does_not_declare_is_held_out() -> None:
    pool = {"train": [row(f"q{n}", "x") for n in range(100)], "test": [row("t", "x")]}
    found = data.divide([pool], Split(validation=0.1, test=0.5), 17, dedup=True).rows
    assert [len(found[split]) for split in SPLITS] == [90, 10, 1]


def test_duplicates_stay_when_the_recipe_says_so_but_never_across_splits() -> None:
    pool = {"train": [row("a", "1"), row("a", "1")], "validation": [row("v", "1")], "test": [row("t", "1")]}
    assert len(data.divide([pool], Split(), 17, dedup=False).rows["train"]) == 2
    assert (
        len(data.divide([pool, {**pool, "test": [row("a", "1")]}], Split(), 17, dedup=False).rows["train"])
        == 0
    )


def test_a_dataset_is_the_same_bytes_twice_and_carries_its_card(tmp_path: Path) -> None:
    write(
        tmp_path / "a.jsonl",
        [(f"q{n} {{text}}", "yes" if n % 2 else "no") for n in range(40)] + [("q1", "é|")],
    )
    told: list[Event] = []
    digests = []
    for out in (tmp_path / "one", tmp_path / "two"):
        out.mkdir()
        facts = data.run(section({"all": "a.jsonl"}), inputs(tmp_path, tell=told.append), out)
        digests.append(artifacts.seal(out))
    assert digests[0] == digests[1] and told
    assert (
        facts["rows"] == {split: len(read(out, split)) for split in SPLITS}
        and sum(facts["rows"].values()) == 41
    )
    assert facts["licences"] == ["MIT"] and facts["duplicates_removed"] == 0
    card = json.loads((out / "card.json").read_text())
    assert card["sources"][0]["files"][0]["sha256"] == artifacts.file_digest(tmp_path / "a.jsonl")
    page = (out / "card.md").read_text()
    assert all(word in page for word in ("MIT", "tests", card["version"], "Not checked", "é\\|"))
    first = read(out, "train")[0]
    assert set(first) == {"id", "where", "messages"} and first["where"].startswith("a.jsonl:")
    assert first["messages"][0]["content"].endswith("{text}")


def test_one_changed_byte_of_a_source_changes_what_is_asked(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [("a", "b")])
    before = data.external(section({"all": "a.jsonl"}), tmp_path)
    write(tmp_path / "a.jsonl", [("a", "c")])
    after = data.external(section({"all": "a.jsonl"}), tmp_path)
    assert before.keys() == after.keys() == {"0.all"} and before != after


def refused(tmp_path: Path, part: Data, words: str) -> DataError:
    with pytest.raises(DataError, match=words) as caught:
        data.run(part, inputs(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    return caught.value


def test_an_unknown_licence_or_purpose_stops_before_anything_is_read(tmp_path: Path) -> None:
    files = {"all": "not-even-there.jsonl"}
    error = refused(tmp_path, section(files, licence="dunno"), "unknown licence 'dunno'.*Apache-2.0")
    assert error.where == "data.sources.0.licence"
    refused(tmp_path, section(files, licence="Apache2"), "did you mean 'Apache-2.0'")
    refused(tmp_path, section(files, purpose="  "), "no purpose")


def test_wrong_declarations_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [("a", "b")])
    refused(tmp_path, section({"trian": "a.jsonl"}), "unknown label 'trian'; did you mean 'train'")
    refused(tmp_path, section({"all": "a.jsonl"}), "no row is left for validation")
    refused(
        tmp_path, section({"all": "a.jsonl"}, split={"validation": 0.5, "test": 0.5}), "nothing to train on"
    )
    refused(
        tmp_path,
        section({"all": "a.jsonl"}, chat=None, values={"label": {"b": "c"}}),
        "`values` needs `chat`",
    )
    refused(
        tmp_path,
        section({"all": "a.jsonl"}, chat={"user": "{txet}"}),
        "unknown column 'txet'; did you mean 'text'",
    )
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(tmp_path, section({"all": "empty.jsonl"}), "no rows")


def test_a_licence_is_recorded_as_spdx_spells_it_and_noncommercial_is_said(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [(f"q{n}", "yes") for n in range(30)])
    facts = data.run(section({"all": "a.jsonl"}, licence="cc-by-nc-4.0"), inputs(tmp_path), tmp_path / "out")
    assert facts["licences"] == ["CC-BY-NC-4.0"]
    assert "no commercial use" in (tmp_path / "out" / "card.md").read_text()


def test_someone_who_asks_to_stop_is_heard(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [("a", "b")])
    with pytest.raises(Interrupted):
        data.run(section({"all": "a.jsonl"}), inputs(tmp_path, stopping=lambda: True), tmp_path / "out")


def test_a_recipe_may_train_on_every_row_and_hold_none_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [(f"q{n}", "yes") for n in range(10)])
    part = section({"train": "a.jsonl"}, split={"validation": 0, "test": 0})
    facts = data.run(part, inputs(tmp_path), tmp_path / "out")
    assert facts["rows"] == {"train": 10, "validation": 0, "test": 0}


def test_prompts_for_a_grader_are_split_and_keep_their_fields(tmp_path: Path) -> None:
    lines = [
        {"messages": [{"role": "user", "content": f"q{n}"}], "reference_answer": {"n": n}} for n in range(20)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    source = {"from": {"name": "files", "files": {"all": "a.jsonl"}}, "licence": "MIT", "purpose": "tests"}
    facts = data.run(
        Data.model_validate({"sources": [source], "rows": "Prompt"}), inputs(tmp_path), tmp_path / "out"
    )
    assert facts["rows"] == {"train": 16, "validation": 2, "test": 2}
    assert facts["answers"]["test"] == {"(the model's own)": 2}
    found = [record for split in SPLITS for record in read(tmp_path / "out", split)]
    assert all(
        record["prompt"][0]["content"] == f"q{record['item']['reference_answer']['n']}" for record in found
    )
    lines[3]["messages"].append({"role": "assistant", "content": "said"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:4.*must end with the user"):
        data.run(
            Data.model_validate({"sources": [source], "rows": "Prompt"}), inputs(tmp_path), tmp_path / "b"
        )


def test_a_column_may_be_both_asked_and_graded(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [(f"q{n}", "yes") for n in range(20)])
    one = section({"all": "a.jsonl"}).model_copy(update={"rows": "Prompt"})
    data.run(one, inputs(tmp_path), tmp_path / "out")
    found = read(tmp_path / "out", "test")[0]
    assert found["prompt"] == [{"role": "user", "content": found["item"]["text"]}]
    assert found["item"]["label"] == "yes"
