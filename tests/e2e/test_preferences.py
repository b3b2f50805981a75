"""The example of preferences, from raw lines to a released model and its report, on a tiny base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.e2e.world import luthier

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_pairs_become_a_released_model_that_prefers_what_was_chosen(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("preferences.yaml", "preferences.jsonl"):
        shutil.copy(EXAMPLES / name, tmp_path / name)
    shutil.copytree(tiny_base, tmp_path / "base")
    home = tmp_path / "home"
    said = luthier(home, "run", str(tmp_path / "preferences.yaml"), "--json")
    facts = {stage: found["facts"] for stage, found in said["stages"].items()}
    assert facts["data"]["rows"] == {"train": 36, "validation": 12, "test": 12}
    systems = facts["evaluate"]["systems"]
    assert systems["tuned"]["accuracy"] >= 0.8 and systems["tuned"]["preferred"] >= 0.8
    assert systems["tuned"]["margin"] > 0 and "margin" not in systems["base"]
    assert facts["release"]["accepted"]
    assert {verdict["gate"] for verdict in facts["release"]["verdicts"]} >= {"floor", "parity"}
    assert len(facts["train"]["checkpoints"]) == 2
    digest = said["stages"]["evaluate"]["digest"]
    (folder,) = home.rglob(f"{digest}*/samples.jsonl")
    samples = [json.loads(line) for line in folder.read_text("utf-8").splitlines()]
    assert sum(row["correct"]["tuned"] for row in samples) == round(12 * systems["tuned"]["accuracy"])
    (page,) = home.rglob("*.html")
    assert "share of pairs whose chosen answer the untouched base finds likelier" in page.read_text("utf-8")


def test_conversations_for_an_objective_of_pairs_are_refused_by_their_line(
    tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLES / "preferences.yaml", tmp_path)
    shutil.copytree(tiny_base, tmp_path / "base")
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "preferences.jsonl").write_text(json.dumps(row) + "\n")
    text = luthier(tmp_path / "home", "run", str(tmp_path / "preferences.yaml"), code=3)
    assert "preferences.jsonl:1" in text and "preferred_output" in text
