"""The plan: exact counts, the same decisions each time, and a refusal that says what would fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luthier import artifacts, template
from luthier.devices import DEVICES
from luthier.errors import PlanError, TrainError
from luthier.forecast import fit, footprint, layout
from luthier.forecast.footprint import Checkpointing
from luthier.rows import chat
from luthier.stages import Inputs, _offers, plan, train
from luthier.stages._elsewhere import Work
from luthier.stages.plan import MICRO_TOKENS, SHARING_TOKENS
from luthier.template import Encoded
from tests.stages.training import phase, planning, records, world


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
    assert facts["closed_peak_gb"] <= would_fit


def test_less_memory_means_smaller_micro_batches(made: Inputs, tmp_path: Path) -> None:
    section = planning(batch=40)
    wide = run(made, tmp_path / "wide", section)
    assert wide["micro_tokens"] == MICRO_TOKENS
    tight = run(made, tmp_path / "tight", planning({"memory_gb": wide["closed_peak_gb"] - 0.005}, batch=40))
    assert tight["micro_tokens"] < MICRO_TOKENS and tight["tokens"] == wide["tokens"]
    assert tight["largest_micro_batch"] < wide["largest_micro_batch"]


@pytest.mark.parametrize(("shared", "tokens"), [(400, SHARING_TOKENS), (0, MICRO_TOKENS)])
def test_micro_batches_are_larger_where_more_rows_then_share_what_they_begin_with(
    shared: int, tokens: int
) -> None:
    rows = [(*range(shared), *range(1000 * (n + 1), 1000 * (n + 1) + 100)) for n in range(40)]
    step = tuple(Encoded(ids=ids, mask=(True,) * len(ids), id=str(n)) for n, ids in enumerate(rows))
    need: Any = fit.Work(None, (step,), (), footprint.How(), 0)  # type: ignore[arg-type]  no memory is asked for
    work: Any = Work(None, need)  # type: ignore[arg-type]
    assert plan._micro_tokens(work, 1) == tokens


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


def test_every_offered_change_was_forecast_and_fits(made: Inputs, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        run(made, tmp_path, planning({"memory_gb": 0.1}))
    assert "plan.device: " in str(caught.value) and "max_length" not in str(caught.value)
    work = plan._work(planning(batch=40), made, ("float32", None))
    need = replace(work.need, shape=replace(work.need.shape, layers=400))
    kinds, others = (Checkpointing.NONE,), (Checkpointing.SELECTIVE, Checkpointing.FULL)
    least = replace(need, how=replace(need.how, checkpointing=kinds[0])).forecast(need.longest).total
    told = str(_offers.too_big(replace(work, need=need), phase(), (least * 0.97, 1), (kinds, others)))
    assert "plan.memory_gb: " in told and "plan.checkpointing: " in told
    length = int(told.split("plan.max_length: ")[1].split()[0])
    cut = layout.of([Encoded(row.ids[:length], row.mask[:length], row.id) for row in need.steps[0][:1]])
    load = replace(need.load(need.longest), layouts=(cut,))
    assert footprint.forecast(need.shape, load, need.how).total <= least * 0.97
    assert "million parameters" in told


def test_the_memory_offered_is_that_of_all_processes_together(made: Inputs, tmp_path: Path) -> None:
    shared = {"processes": 2, "placement": "ddp", "memory_gb": 0.1}
    with pytest.raises(PlanError) as caught:
        run(made, tmp_path / "refused", planning(shared))
    offered = float(str(caught.value).split("fit: plan.memory_gb: ")[1].split(";")[0])
    assert run(made, tmp_path / "taken", planning({**shared, "memory_gb": offered}))["processes"] == 2


def test_a_device_of_the_table_is_planned_for_without_being_here(made: Inputs, tmp_path: Path) -> None:
    section = planning({"device": "h100-sxm", "price_per_hour": 3.0, "price_per_kwh": 0.3})
    facts = run(made, tmp_path, section)
    assert facts["device"] == "h100-sxm" and facts["budget_gb"] == 80 and facts["minutes"] > 0
    hours = facts["minutes"] / 60
    assert facts["energy_kwh"] == pytest.approx(0.7 * hours, rel=0.01)
    assert facts["money"] == pytest.approx(3 * hours + 0.3 * 0.7 * hours, rel=0.01)
    assert "pace" not in facts, "nothing of it was measured"


def test_training_here_does_not_start_from_a_plan_for_elsewhere(made: Inputs, tmp_path: Path) -> None:
    section = planning({"device": "l4"})
    run(made, tmp_path, section)
    inputs = replace(made, artefacts={**made.artefacts, "plan": tmp_path})
    with pytest.raises(TrainError, match="the plan is for l4"):
        train.run(section.phases, inputs, tmp_path / "train")


def test_an_unknown_device_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="did you mean 'h100-sxm'"):
        planning({"device": "h100-sxn"})


def test_without_a_price_there_is_no_money_and_without_watts_no_energy(made: Inputs, tmp_path: Path) -> None:
    facts = run(made, tmp_path / "plain")
    assert not {"money", "energy_kwh"} & facts.keys()
    facts = run(made, tmp_path / "priced", planning({"price_per_hour": 60.0, "watts": 100}))
    assert facts["money"] == pytest.approx(facts["minutes"], rel=0.02)
    assert facts["energy_kwh"] == pytest.approx(facts["minutes"] / 600, rel=0.1, abs=2e-6)


def test_a_plan_tells_what_devices_of_the_table_would_take(made: Inputs, tmp_path: Path) -> None:
    facts = run(made, tmp_path)
    assert {line["device"] for line in facts["elsewhere"]} == set(DEVICES)
    assert all(line["fits"] and line["minutes"] > 0 for line in facts["elsewhere"])
    assert facts["operations"]["total"] == sum(
        count for kind, count in facts["operations"].items() if kind != "total"
    )


def test_an_unusual_share_of_trained_weights_is_noted(made: Inputs, tmp_path: Path) -> None:
    (note,) = run(made, tmp_path)["warnings"]
    assert "of the weights train; usual for lora is 0.01 to 1 %" in note


def test_sharded_layers_compute_nothing_again_and_say_so(made: Inputs, tmp_path: Path) -> None:
    shared = {"processes": 2, "placement": "fsdp"}
    assert run(made, tmp_path / "shared", planning(shared))["checkpointing"] == "none"
    with pytest.raises(PlanError, match="does not go with sharded layers"):
        run(made, tmp_path / "asked", planning({**shared, "checkpointing": "full"}))


def test_what_is_computed_again_can_be_asked_for(made: Inputs, tmp_path: Path) -> None:
    usual = run(made, tmp_path / "usual")
    full = run(made, tmp_path / "full", planning({"checkpointing": "full"}))
    assert usual["checkpointing"] == "none" and full["checkpointing"] == "full"
    assert full["bytes"]["activations"] < usual["bytes"]["activations"]
    assert full["operations"]["total"] > usual["operations"]["total"]
