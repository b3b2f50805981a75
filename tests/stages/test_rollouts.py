"""Reinforcement on a tiny model: what is rewarded is learnt, and a kill changes no bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import artifacts
from luthier.errors import GraderError, Interrupted, PlanError
from luthier.recipe import Phase, Plan, Planning
from luthier.rows import prompt
from luthier.stages import Event, Inputs, plan, train
from tests.stages.training import SEED

VOWEL = {
    "name": "multi", "calculate_output": "max(a, e)",
    "graders": {
        name: {"name": "string_check", "operation": "ilike", "reference": name} for name in ("a", "e")
    },
}  # fmt: skip
PHASE: dict[str, Any] = {
    "steps": 6, "batch": 3, "lr": 2e-2, "warmup": 0.0, "schedule": "constant", "checkpoint_every": 2,
    "objective": {"name": "grpo", "group": 4, "max_new_tokens": 6, "grader": VOWEL},
    "method": {"name": "lora", "r": 4, "alpha": 8},
    "validation": {"every": 3, "rows": 4, "patience": 9},
}  # fmt: skip


def records(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [
        prompt(
            [{"role": "user", "content": "".join(draw.choices("cdfgh", k=draw.randint(2, 6)))}],
            {"n": n},
            f"rows:{n + 1}",
        ).as_record()
        for n in range(count)
    ]


def phase(objective: dict[str, Any] | None = None, **changes: Any) -> Phase:
    return Phase.model_validate(
        {**PHASE, **changes, "objective": {**PHASE["objective"], **(objective or {})}}
    )


def world(folder: Path, base: Path, made: Phase) -> Inputs:
    data, model, planned = folder / "data", folder / "model", folder / "plan"
    for split, found in (("train", records(9, 1)), ("validation", records(4, 2)), ("test", [])):
        (data / "rows").mkdir(parents=True, exist_ok=True)
        artifacts.write_jsonl(data / "rows" / f"{split}.jsonl", found)
    artifacts.link_tree(base, model / "base")
    artifacts.write_json(model / "base.json", {"digest": "0123456789abcdef" * 4, "dtype": "float32"})
    digests = {"data": artifacts.seal(data), "model": artifacts.seal(model)}
    artefacts = {"data": data, "model": model}
    given = Inputs("toy", artefacts, digests, folder, folder / "cache", folder / "scratch", SEED)
    given.scratch.mkdir()
    planned.mkdir()
    plan.run(Planning(budget=Plan(threads=1), phases=(made,)), given, planned)
    return replace(
        given, artefacts={**artefacts, "plan": planned}, digests={**digests, "plan": artifacts.seal(planned)}
    )


def run(inputs: Inputs, folder: Path, made: Phase) -> tuple[str, dict[str, Any]]:
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True, exist_ok=True)
    scratch.mkdir(exist_ok=True)
    facts = train.run((made,), replace(inputs, scratch=scratch), out)
    return artifacts.seal(out), facts


def test_what_is_rewarded_is_learnt(tiny_base: Path, tmp_path: Path) -> None:
    made = phase({"group": 8, "max_new_tokens": 8}, steps=30, batch=4, validation={"every": 10, "rows": 4})
    inputs = world(tmp_path, tiny_base, made)
    _, facts = run(inputs, tmp_path / "run", made)
    curve = artifacts.read_jsonl(tmp_path / "run" / "out" / "curve.jsonl")
    first, last = (sum(row["reward"] for row in rows) / 5 for rows in (curve[:5], curve[-5:]))
    assert last > first + 0.3, [row["reward"] for row in curve]
    assert facts["validation_loss"] is not None
    assert all(row["clipped"] == 0.0 and row["kl"] == 0.0 for row in curve)
    assert {"reward", "reward_std", "answer_tokens", "ended", "flat_groups", "unreadable"} <= curve[0].keys()


VARIANTS = {
    "plain": phase(),
    "several updates, divergence, temperature": phase({"iterations": 2, "beta": 0.05, "temperature": 0.8}),
}


@pytest.mark.parametrize("made", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_stop_after_any_step_changes_no_bit(made: Phase, tiny_base: Path, tmp_path: Path) -> None:
    inputs = world(tmp_path, tiny_base, made)
    whole, facts = run(inputs, tmp_path / "whole", made)
    ledger = artifacts.read_jsonl(tmp_path / "whole" / "out" / "ledger.jsonl")
    assert [len(row["rows"]) for row in ledger] == [3] * 6
    for after in (1, 3, 4):
        seen: list[int] = []

        def tell(event: Event, seen: list[int] = seen) -> None:
            if "loss" in event.facts:
                seen.append(event.done or 0)

        folder = tmp_path / f"after-{after}"
        with pytest.raises(Interrupted):
            stopping = lambda seen=seen, after=after: len(seen) >= after  # noqa: E731
            run(replace(inputs, tell=tell, stopping=stopping), folder, made)
        digest, again = run(inputs, folder, made)
        assert digest == whole
        assert again["validation_loss"] == facts["validation_loss"]


def test_the_second_update_on_one_sampling_departs_from_the_policy_that_spoke(
    tiny_base: Path, tmp_path: Path
) -> None:
    made = phase({"iterations": 2, "beta": 0.05, "clip": 0.01}, lr=5e-2)
    run(world(tmp_path, tiny_base, made), tmp_path / "run", made)
    curve = artifacts.read_jsonl(tmp_path / "run" / "out" / "curve.jsonl")
    assert all(row["clipped"] == 0.0 for row in curve[0::2])  # the ratio is exactly 1
    assert any(row["clipped"] > 0.0 for row in curve[1::2])
    assert curve[0]["kl"] == 0.0 and curve[-1]["kl"] > 0.0
    assert all(a["reward"] == b["reward"] for a, b in zip(curve[0::2], curve[1::2], strict=True))


def planned(folder: Path, base: Path, budget: dict[str, Any], made: Phase) -> dict[str, Any]:
    given = world(folder, base, phase())
    out = folder / "again"
    out.mkdir()
    return plan.run(
        Planning(budget=Plan.model_validate({"threads": 1, **budget}), phases=(made,)), given, out
    )


def test_a_plan_counts_answers_at_their_longest_and_what_sampling_takes(
    tiny_base: Path, tmp_path: Path
) -> None:
    found = planned(tmp_path / "a", tiny_base, {}, phase({"iterations": 3}))
    prompts = [len(record["prompt"][0]["content"]) for record in records(9, 1)]
    assert found["longest_row"] > max(prompts) + 6 and found["validation_rows"] == 4
    assert found["loss_tokens"] == 6 * 3 * 4 * 6  # steps, prompts, answers, tokens
    assert found["epochs"] == round(6 * 3 / 9 / 3, 4)
    assert 0 < found["sampling_minutes"] < found["minutes"]
    assert found["sampling_bytes"] > 4 * 90_000  # the base a second time, and more
    assert any("sampling" in line for line in found["warnings"])


@pytest.mark.parametrize(
    ("budget", "objective", "words"),
    [
        ({"processes": 2}, {}, "sampled by one process"),
        ({"max_length": 16}, {}, "plan.max_length is 16"),
        ({"memory_gb": 0.1}, {}, "plan.memory_gb"),
        (
            {},
            {
                "grader": {
                    "name": "score_model",
                    "model": "gpt-4o",
                    "input": [{"role": "user", "content": "?"}],
                }
            },
            "the only judge at hand",
        ),
    ],
)
def test_a_plan_refuses_what_sampling_cannot_do(
    budget: dict[str, Any], objective: dict[str, Any], words: str, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=words):
        planned(tmp_path, tiny_base, budget, phase(objective))


def test_a_row_that_lacks_a_field_of_the_grader_is_named_before_anything_is_trained(
    tiny_base: Path, tmp_path: Path
) -> None:
    grader = {"name": "string_check", "reference": "{{ item.reference_answer }}"}
    with pytest.raises(GraderError, match=r"rows:1: there is nothing at item\.reference_answer"):
        planned(tmp_path, tiny_base, {}, phase({"grader": grader}))


def test_the_base_itself_may_judge(tiny_base: Path, tmp_path: Path) -> None:
    judge = {
        "name": "score_model", "failure_score": 0.25,
        "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
        "sampling_params": {"max_completions_tokens": 4},
    }  # fmt: skip
    made = phase({"grader": judge}, steps=1)
    run(world(tmp_path, tiny_base, made), tmp_path / "run", made)
    (row,) = artifacts.read_jsonl(tmp_path / "run" / "out" / "curve.jsonl")
    assert row["reward"] == 0.25 and row["flat_groups"] == 3  # a random judge says no number
