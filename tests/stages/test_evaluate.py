from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier import artifacts, template
from luthier.errors import DataError, Interrupted
from luthier.inference.generate import Runtime
from luthier.rows import chat
from luthier.stages import Inputs, _called, evaluate
from luthier.statistics import mcnemar, scores, wilson
from tests.stages.judging import LABELS, evaluate_section, heard, stopping_after, trained


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return trained(tmp_path_factory.mktemp("trained"), tiny_base)


@pytest.fixture(scope="module")
def done(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("evaluated")
    return out, evaluate.run(evaluate_section(), inputs, out)


def card(done: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = artifacts.read_json(done[0] / "scorecard.json")
    return found


def samples(done: tuple[Path, dict[str, Any]]) -> list[dict[str, Any]]:
    return artifacts.read_jsonl(done[0] / "samples.jsonl")


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Injection.", "injection"),
        ("it is SAFE, not an injection", "safe"),
        ("unsafe", None),
        ("", None),
        ("safe_mode", None),
        ("**safe**", "safe"),
        ("safe mode on", "safe mode"),
    ],
)
def test_an_answer_is_read_as_the_first_label_that_is_a_word_of_its_own(text: str, label: str | None) -> None:
    assert evaluate.read(text, ("injection", "safe", "safe mode")) == label


@given(st.text(max_size=40), st.sampled_from(LABELS))
def test_reading_finds_a_label_wherever_it_stands_alone(noise: str, label: str) -> None:
    assert evaluate.read(f"{label.upper()} {noise}", LABELS) == label


def test_free_answers_are_compared_whole() -> None:
    assert evaluate.read("  the sun \n", ()) == "the sun"
    assert evaluate.read("  ", ()) is None


def test_the_figures_are_those_of_the_samples(done: tuple[Path, dict[str, Any]]) -> None:
    rows, found = samples(done), card(done)
    assert found["rows"] == len(rows) == 24
    assert set(found["systems"]) == {"base", "tuned", "tfidf", "best_prompt"}
    gold = [row["gold"] for row in rows]
    for name, score in found["systems"].items():
        said = [row["said"][name] for row in rows]
        again = scores(gold, said, "yes")
        assert (score["accuracy"], score["f1"], score["unparsed"]) == (
            again.accuracy,
            again.f1,
            again.unparsed,
        )
        assert (score["low"], score["high"]) == wilson(round(again.accuracy * 24), 24)
        assert score["confusion"] == again.confusion
        assert [row["correct"][name] for row in rows] == [a == b for a, b in zip(said, gold, strict=True)]
    for name in ("base", "tfidf", "best_prompt"):
        wins = sum(row["correct"]["tuned"] and not row["correct"][name] for row in rows)
        losses = sum(row["correct"][name] and not row["correct"]["tuned"] for row in rows)
        expected = {"wins": wins, "losses": losses, "p": mcnemar(wins, losses)}
        assert found["paired"][f"tuned_vs_{name}"] == expected


def test_the_answers_kept_are_those_that_were_read(done: tuple[Path, dict[str, Any]]) -> None:
    for row in samples(done):
        for name in ("base", "tuned"):
            assert evaluate.read(row["answers"][name], LABELS) == row["said"][name]
    assert any(row["answers"]["base"] != row["answers"]["tuned"] for row in samples(done))


def test_the_baselines_are_honest(done: tuple[Path, dict[str, Any]]) -> None:
    systems = card(done)["systems"]
    assert systems["tfidf"]["accuracy"] > 0.9  # the first word gives the answer away
    assert "validation rows" in systems["best_prompt"]["note"]
    assert systems["best_prompt"]["candidates"]


def test_loss_and_perplexity_stand_for_base_and_tuned(done: tuple[Path, dict[str, Any]]) -> None:
    found = card(done)
    assert set(found["loss"]) == set(found["perplexity"]) == {"base", "tuned"}
    assert found["loss"]["base"] != found["loss"]["tuned"]


def test_what_depends_on_the_clock_lies_outside_the_digest(
    done: tuple[Path, dict[str, Any]], inputs: Inputs, tmp_path: Path
) -> None:
    evaluate.run(evaluate_section(), inputs, tmp_path)
    for name in ("scorecard.json", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (done[0] / name).read_bytes()
    observed = artifacts.read_json(tmp_path / "observed" / "efficiency.json")
    assert observed["requests"] == 3 and observed["errors"] == 0
    assert 0 < observed["first_token"]["p50"] <= observed["latency"]["p50"] <= observed["latency"]["p99"]
    assert observed["tokens_per_s"] > 0 and observed["peak_rss_bytes"] > 10**7
    assert set(observed["baseline_seconds"]) == {"tfidf", "best_prompt"}
    adapter = inputs.artefacts["train"] / "adapter"
    assert observed["adapter_bytes"] == sum(path.stat().st_size for path in adapter.iterdir())


def test_fewer_rows_are_a_seeded_sample(inputs: Inputs, tmp_path: Path) -> None:
    inputs, events = heard(inputs)
    section = evaluate_section(rows=5, baselines=[], labels=[], positive=None)
    facts = evaluate.run(section, inputs, tmp_path)
    assert facts["rows"] == 5
    found = artifacts.read_json(tmp_path / "scorecard.json")
    assert found["systems"]["tuned"]["f1"] is None and found["systems"]["tuned"]["kappa"] is None
    assert any(event.done == event.total == 5 and "eta_s" in event.facts for event in events)


def test_a_right_answer_that_is_no_label_is_refused_before_any_work(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows:\d+: the right answer '(yes|no)' is not one of"):
        evaluate.run(evaluate_section(labels=["yes", "maybe"]), inputs, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("calls", [0, 1, 3, 6])
def test_a_wish_to_stop_is_heard_at_any_point(calls: int, inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        evaluate.run(evaluate_section(), replace(inputs, stopping=stopping_after(calls)), tmp_path)
    assert not (tmp_path / "scorecard.json").exists()


def test_the_scorecard_says_whose_rows_were_asked(inputs: Inputs, tmp_path: Path) -> None:
    section = evaluate_section(split="validation", baselines=[])
    facts = evaluate.run(section, inputs, tmp_path)
    assert facts["rows"] == 8
    assert artifacts.read_json(tmp_path / "scorecard.json")["split"] == "validation"


def test_rows_with_tools_are_asked_with_their_tools_and_their_calls_are_told_apart(
    tiny_base: Path, tmp_path: Path
) -> None:
    inputs = trained(tmp_path / "trained", tiny_base)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    asked = [{"role": "user", "content": "Is it warm in Rome?"}]
    answer = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    row = chat([*asked, *answer], "here:1", tools)
    rows = inputs.artefacts["data"] / "rows" / "test.jsonl"
    artifacts.write_jsonl(rows, [row.as_record(), chat([*asked, answered("yes")], "here:2").as_record()])
    section = evaluate_section(labels=(), positive=None, baselines=[], max_new_tokens=12)
    facts = evaluate.run(section, inputs, tmp_path / "out")
    found = artifacts.read_json(tmp_path / "out" / "scorecard.json")["calls"]
    assert facts["calls"] == found and found["rows"] == 1
    for name in ("base", "tuned"):  # a random model calls nothing
        assert found["systems"][name]["missing"] == 1 and found["systems"][name]["right"] == 0
    tokenizer = template.load_tokenizer(tiny_base)
    alone, offered = (template.prompt_ids(tokenizer, row.prompt, some) for some in ((), row.tools))
    model = Runtime.load(tiny_base)
    said = artifacts.read_jsonl(tmp_path / "out" / "samples.jsonl")[0]["answers"]["base"]
    texts = [
        tokenizer.decode(
            model.greedy([ids], 12, None, template.stop_ids(tokenizer))[0], skip_special_tokens=True
        )
        for ids in (alone, offered)
    ]
    assert said == texts[1].strip() != texts[0].strip()


def test_an_answers_calls_are_judged_against_the_rows_own() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("weather", "time")]
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    asked = {"role": "user", "content": "Is it warm in Rome?"}
    calling = chat([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], "here:1", tools)
    plain = chat([asked, answered("yes")], "here:2", tools)
    spelt = '<tool_call>{"name": "%s", "arguments": {"city": "%s"}}</tool_call>'
    texts = {
        "base": [spelt % ("forecast", "Rome"), spelt % ("time", "Rome")],
        "tuned": [spelt % ("weather", "Rome"), "yes"],
        "other": [spelt % ("weather", "Paris"), "no"],
    }
    found = _called.rates([calling, plain], texts)
    assert found is not None and found["rows"] == 2
    assert found["systems"]["tuned"]["right"] == 2
    assert (found["systems"]["base"]["hallucinated"], found["systems"]["base"]["unasked"]) == (1, 1)
    assert (found["systems"]["other"]["wrong_arguments"], found["systems"]["other"]["right"]) == (1, 1)
    assert _called.said(calling, texts["tuned"][0]) == calling.answer
    assert _called.said(plain, "yes") is None and _called.rates([], {}) is None


def answered(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
