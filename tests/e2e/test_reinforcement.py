"""Reinforcement from a file of prompts to a promoted release, through the public verbs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

import luthier
from luthier import artifacts
from luthier.errors import RecipeError
from tests.stages.test_rollouts import VOWEL
from tests.tiny import make_tiny_base


def recipe(folder: Path) -> Path:
    make_tiny_base(folder / "base")
    draw = random.Random(3)
    lines = [
        {
            "messages": [{"role": "user", "content": "".join(draw.choices("cdfgh", k=4)) + str(n)}],
            "reference_answer": {"vowels": ["a", "e"]},
        }
        for n in range(80)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    graders = {
        name: {**grader, "reference": f"{{{{ item.reference_answer.vowels[{n}] }}}}"}
        for n, (name, grader) in enumerate(VOWEL["graders"].items())
    }
    made = {
        "luthier": 1, "name": "toy",
        "data": {
            "sources": [
                {
                    "from": {"name": "files", "files": {"all": "rows.jsonl"}},
                    "licence": "MIT", "purpose": "tests",
                }
            ],
            "split": {"validation": 0.1, "test": 0.4},
        },
        "model": {
            "from": {"name": "files", "files": {"model": "base"}},
            "licence": "Apache-2.0", "dtype": "float32",
        },
        "plan": {"max_length": 64, "threads": 1},
        "train": [
            {
                "objective": {
                    "name": "grpo", "group": 8, "max_new_tokens": 8, "grader": {**VOWEL, "graders": graders},
                },
                "method": {"name": "lora", "r": 8, "alpha": 16},
                "steps": 30, "batch": 4, "lr": 2e-2, "warmup": 0.0,
                "validation": {"every": 10, "rows": 8, "patience": 9},
            }
        ],
        "evaluate": {"max_new_tokens": 8, "latency_requests": 2},
        "release": {
            "gates": [
                {"name": "floor", "metric": "reward", "minimum": 0.2}, {"name": "no_regression"},
                {"name": "parity", "rows": 3},
            ],
            "intended_use": "tests", "limits": "do not use",
        },
    }  # fmt: skip
    (folder / "toy.yaml").write_text(yaml.safe_dump(made, sort_keys=False), "utf-8")
    return folder / "toy.yaml"


def test_prompts_and_a_grader_become_a_release_that_earns_more_than_its_base(tmp_path: Path) -> None:
    path, home = recipe(tmp_path), tmp_path / "home"
    outcome = luthier.run(path, home=home)
    facts = outcome.stage("evaluate").facts
    assert facts["systems"]["tuned"]["reward"] > facts["systems"]["base"]["reward"] + 0.3
    pair = facts["paired"]["tuned_vs_base"]
    assert pair["low"] <= pair["difference"] <= pair["high"] and pair["wins"] > pair["losses"]
    assert outcome.status == "done" and outcome.release is not None
    release = artifacts.read_json(home / "artifacts" / outcome.release / "release.json")
    assert [verdict["passed"] for verdict in release["verdicts"]] == [True] * 5
    page = (outcome.report or Path()).read_text("utf-8")
    assert "Mean reward" in page and "Reward over training" in page
    card = (home / "artifacts" / outcome.release / "card.md").read_text("utf-8")
    assert "| tuned | " in card and "mean reward" in card
    again = luthier.run(path, home=home)
    assert all(stage.reused for stage in again.stages)


def test_a_grader_that_a_recipe_names_wrongly_is_told_with_its_place(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    text = path.read_text("utf-8").replace("max(a, e)", "max(a, u)")
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=r"unknown grader 'u'"):
        luthier.run(path, home=tmp_path / "home")
