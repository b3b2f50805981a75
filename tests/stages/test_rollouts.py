"""Reinforcement on a tiny model: what is rewarded is learnt, and a kill changes no bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import artifacts
from luthier.errors import Interrupted
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
