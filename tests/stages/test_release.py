from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from luthier import artifacts, cards
from luthier.errors import Interrupted, ModelError
from luthier.stages import STAGES, Inputs, evaluate, release
from tests.stages.judging import also, evaluate_section, release_section, stopping_after, trained

GATES = ("compatibility", "floor", "parity", "model card")


@pytest.fixture(scope="module")
def inputs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    before = trained(tmp_path_factory.mktemp("trained"), tiny_base)
    out = tmp_path_factory.mktemp("evaluated")
    evaluate.run(evaluate_section(baselines=[{"name": "tfidf"}]), before, out)
    return also(before, evaluate=out)


def judged(inputs: Inputs, out: Path, *gates: dict[str, Any]) -> dict[str, dict[str, Any]]:
    release.run(release_section(*gates), inputs, out)
    found = artifacts.read_json(out / "release.json")
    assert found["accepted"] == all(verdict["passed"] for verdict in found["verdicts"])
    return {verdict["gate"]: verdict for verdict in found["verdicts"]}


def changed(inputs: Inputs, folder: Path, stage: str, change: Any) -> Inputs:
    """The same inputs with one artefact copied, changed and sealed again."""
    copy = folder / stage
    shutil.copytree(inputs.artefacts[stage], copy)
    (copy / "manifest.json").unlink()
    change(copy)
    return also(inputs, **{stage: copy})


def rewrite(path: Path, **fields: Any) -> None:
    record = artifacts.read_json(path) | fields
    path.unlink()
    artifacts.write_json(path, record)


def test_a_good_candidate_is_accepted_with_adapter_card_and_lineage(inputs: Inputs, tmp_path: Path) -> None:
    facts = release.run(release_section(), inputs, tmp_path)
    assert facts["accepted"] is True
    found = artifacts.read_json(tmp_path / "release.json")
    assert tuple(verdict["gate"] for verdict in found["verdicts"]) == GATES
    assert {stage: found[stage] for stage in STAGES["release"].needs} == {
        stage: inputs.digests[stage] for stage in STAGES["release"].needs
    }
    assert found["champion"] is None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        trained_file = inputs.artefacts["train"] / "adapter" / name
        assert (tmp_path / "adapter" / name).read_bytes() == trained_file.read_bytes()
    page = (tmp_path / "card.md").read_text("utf-8")
    for words in ("Intended use", "Limits", "tfidf", "Apache-2.0", "MIT", inputs.digests["train"], "parity"):
        assert words in page


def test_the_same_evidence_gives_the_same_release_but_for_what_was_observed(
    inputs: Inputs, tmp_path: Path
) -> None:
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        release.run(release_section(), inputs, tmp_path / name)
        digests.add(artifacts.seal(tmp_path / name))
    assert len(digests) == 1


def test_every_gate_is_heard_even_after_a_refusal(inputs: Inputs, tmp_path: Path) -> None:
    gates = ({"name": "floor", "minimum": 1.0}, {"name": "no_regression"}, {"name": "parity", "rows": 3})
    found = judged(inputs, tmp_path, *gates)
    assert not found["floor"]["passed"] and not found["no_regression"]["passed"]
    assert found["parity"]["passed"]
    assert (tmp_path / "card.md").read_text("utf-8").count("REFUSED") == 2


def test_a_gate_that_cannot_reach_a_verdict_has_refused(inputs: Inputs, tmp_path: Path) -> None:
    def blind(folder: Path) -> None:
        rewrite(folder / "scorecard.json", systems={"base": {}})

    bad = changed(inputs, tmp_path, "evaluate", blind)
    verdict = release._judge(release_section().gates[0], release._evidence(bad)[0])
    assert not verdict["passed"] and "no verdict" in verdict["reason"]


def test_an_adapter_of_another_base_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    other = changed(inputs, tmp_path, "train", lambda folder: rewrite(folder / "phase.json", base="f" * 64))
    (tmp_path / "out").mkdir()
    found = judged(other, tmp_path / "out")
    assert not found["compatibility"]["passed"] and "another base" in found["compatibility"]["reason"]


@pytest.mark.parametrize("hole", [{"limits": ""}, {"intended_use": ""}])
def test_a_hole_in_the_model_card_is_a_refusal(hole: dict[str, str], inputs: Inputs, tmp_path: Path) -> None:
    section = release_section().model_copy(update=hole)
    facts = release.run(section, inputs, tmp_path)
    assert facts["accepted"] is False
    assert next(iter(hole)) in facts["verdicts"][-1]["reason"]


def test_a_base_of_no_known_licence_is_a_hole_in_the_card(inputs: Inputs, tmp_path: Path) -> None:
    bare = changed(inputs, tmp_path, "model", lambda folder: rewrite(folder / "base.json", licence=""))
    (tmp_path / "out").mkdir()
    found = judged(bare, tmp_path / "out")
    assert found["model card"]["reason"] == "the card lacks base.licence"


def test_missing_names_absent_and_empty_fields() -> None:
    assert set(cards.missing({})) == set(cards.REQUIRED)
    full = {field: {"x": 1} for field in cards.REQUIRED}
    assert cards.missing(full) == []
    assert cards.missing(full | {"data": {"version": None}}) == ["data.version"]


def test_the_release_in_production_is_compared_row_by_row(inputs: Inputs, tmp_path: Path) -> None:
    def right_on(count: int) -> Any:
        def change(folder: Path) -> None:
            rows = artifacts.read_jsonl(folder / "samples.jsonl")
            (folder / "samples.jsonl").unlink()
            made = [row | {"correct": {"base": False, "tuned": n < count}} for n, row in enumerate(rows)]
            artifacts.write_jsonl(folder / "samples.jsonl", made)

        return change

    first = tmp_path / "first"
    first.mkdir()
    release.run(release_section(), inputs, first)
    candidate = also(changed(inputs, tmp_path, "evaluate", right_on(20)), champion=first)
    for name, right, passes in (("equal", 20, True), ("better", 24, False)):
        with_champion = changed(candidate, tmp_path / name, "champion", right_on(right))
        out = tmp_path / name / "out"
        out.mkdir()
        verdict = judged(with_champion, out, {"name": "no_regression"})["no_regression"]
        assert verdict["passed"] is passes
        assert verdict["evidence"]["champion"]["losses"] == right - 20
        found = artifacts.read_json(out / "release.json")
        assert found["champion"] == with_champion.digests["champion"]


def test_the_rehearsal_is_logged_as_the_server_would(inputs: Inputs, tmp_path: Path) -> None:
    release.run(release_section(), inputs, tmp_path)
    log = artifacts.read_jsonl(tmp_path / "observed" / "requests.jsonl")
    assert len(log) == release.REHEARSAL
    for request in log:
        assert request["status"] == 200 and request["model"] == "toy@rehearsal"
        assert 1 <= request["completion_tokens"] <= 4 < request["prompt_tokens"]
        assert 0 < request["first_token_s"] <= request["total_s"]


def test_a_damaged_adapter_never_becomes_a_release(inputs: Inputs, tmp_path: Path) -> None:
    def damage(folder: Path) -> None:
        path = folder / "adapter" / "adapter_model.safetensors"
        weights = load_file(path)
        name = sorted(weights)[0]
        weights[name][0, 0] = float("nan")
        path.unlink()
        save_file(weights, path)

    broken = changed(inputs, tmp_path, "train", damage)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="NaN or infinity"):
        release.run(release_section(), broken, tmp_path / "out")
    assert not (tmp_path / "out" / "release.json").exists()


@pytest.mark.parametrize("calls", [0, 20, 22])
def test_a_wish_to_stop_is_not_mistaken_for_a_refusal(calls: int, inputs: Inputs, tmp_path: Path) -> None:
    section = release_section({"name": "parity", "rows": 24})
    with pytest.raises(Interrupted):
        release.run(section, replace(inputs, stopping=stopping_after(calls)), tmp_path)
    assert not (tmp_path / "release.json").exists()
