"""The plan: exact counts, the same decisions each time, and a refusal that says what would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from luthier import artifacts, template
from luthier.errors import PlanError
from luthier.rows import chat
from luthier.stages import Inputs, plan
from luthier.stages.plan import MICRO_TOKENS
from tests.stages.training import planning, records, world


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Inputs:
    return world(tmp_path_factory.mktemp("plan"), tiny_base)


def run(inputs: Inputs, out: Path, section: Any = None) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    return plan.run(section or planning(), inputs, out)


def test_a_plan_counts_exactly_what_training_will_read(made: Inputs, tmp_path: Path) -> None:
    facts = run(made, tmp_path)
    tokenizer = template.load_tokenizer(made.artefacts["model"] / "base")
    rows = template.encode_all(tokenizer, [chat(row["messages"], "x") for row in records(40)])
    assert facts["tokens_per_epoch"] == sum(len(row.ids) for row in rows)
    assert facts["longest_row"] == max(len(row.ids) for row in rows)
    assert facts["steps"] == 12 and facts["epochs"] == 1.2 and facts["validation_rows"] == 6
    assert facts["trainable_parameters"] == 2 * 4 * (128 + 96 + 96 + 128 + 192 * 3)
    assert facts["tokens"] > facts["loss_tokens"] > 0
    assert facts["peak_gb"] > 0 and facts["minutes"] > 0


def test_decisions_are_the_same_each_time_and_measures_are_kept_apart(made: Inputs, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run(made, tmp_path / name)
    digests = {artifacts.seal(tmp_path / name) for name in ("one", "two")}
    assert len(digests) == 1
    seen = artifacts.read_json(tmp_path / "one" / "observed" / "prediction.json")
    assert seen["bytes"]["total"] == sum(n for kind, n in seen["bytes"].items() if kind != "total")
    assert {"peak_gb", "minutes", "host", "tokens_per_s", "budget_gb"} <= seen.keys()
    decisions = artifacts.read_json(tmp_path / "one" / "plan.json")
    assert {"threads", "dtype", "micro_tokens"} <= decisions.keys()
    assert not {"peak_gb", "minutes", "tokens_per_s"} & decisions.keys()


def test_epochs_become_steps(made: Inputs, tmp_path: Path) -> None:
    facts = run(made, tmp_path, planning(steps=None, epochs=1.0))
    assert facts["steps"] == 10 and facts["tokens"] == facts["tokens_per_epoch"]


def test_a_row_longer_than_allowed_is_named(made: Inputs, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        run(made, tmp_path, planning({"max_length": 40}))
    said = str(caught.value)
    assert "rows:" in said and "plan.max_length is 40" in said and "plan.max_length: " in said
    would_fit = int(said.rsplit("plan.max_length: ", 1)[1].split()[0])
    assert run(made, tmp_path, planning({"max_length": would_fit}))["longest_row"] <= would_fit


def test_what_cannot_fit_in_memory_is_refused_with_what_would(made: Inputs, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        run(made, tmp_path, planning({"memory_gb": 0.1}))
    would_fit = float(str(caught.value).rsplit("plan.memory_gb: ", 1)[1].split(";")[0])
    facts = run(made, tmp_path, planning({"memory_gb": would_fit}))
    assert facts["peak_gb"] <= would_fit


def test_less_memory_means_smaller_micro_batches(made: Inputs, tmp_path: Path) -> None:
    section = planning(batch=40)
    wide = run(made, tmp_path / "wide", section)
    assert wide["micro_tokens"] == MICRO_TOKENS
    tight = run(made, tmp_path / "tight", planning({"memory_gb": wide["peak_gb"] - 0.005}, batch=40))
    assert tight["micro_tokens"] < MICRO_TOKENS and tight["tokens"] == wide["tokens"]
    assert tight["largest_micro_batch"] < wide["largest_micro_batch"]


def test_too_few_minutes_are_refused_with_the_steps_that_would_fit(made: Inputs, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="steps: ") as caught:
        run(made, tmp_path, planning({"minutes": 0.001}, steps=4000))
    assert "plan.minutes: " in str(caught.value)


def test_the_recipe_may_ask_for_fewer_threads_but_not_for_more_than_there_are(
    made: Inputs, tmp_path: Path
) -> None:
    assert run(made, tmp_path, planning({"threads": 1}))["threads"] == 1
    assert run(made, tmp_path, planning({"threads": 999}))["threads"] < 999


def test_an_empty_validation_split_is_allowed(tiny_base: Path, tmp_path: Path) -> None:
    inputs = world(tmp_path, tiny_base, validation=0)
    assert run(replace(inputs), tmp_path / "out")["validation_rows"] == 0
