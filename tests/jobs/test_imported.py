from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier import recipe_file
from tests.e2e.world import luthier
from tests.jobs.place import World, chats, jsonl

OLD = {
    "id": "ftjob-AbC123xyz", "object": "fine_tuning.job", "model": "gpt-4o-mini-2024-07-18",
    "created_at": 1730000000, "finished_at": 1730001000, "status": "succeeded", "organization_id": "org-1",
    "fine_tuned_model": "ft:gpt-4o-mini-2024-07-18:acme:support:AbC", "training_file": "file-train",
    "validation_file": "file-valid", "result_files": ["file-results"], "trained_tokens": 5000, "error": None,
    "hyperparameters": {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.8}, "seed": 42,
    "user_provided_suffix": "support", "integrations": [], "metadata": None, "estimated_finish": None,
    "method": {
        "type": "supervised", "dpo": None, "reinforcement": None,
        "supervised": {
            "hyperparameters": {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 1.8}
        },
    },
}  # fmt: skip


def imported(folder: Path, jobs: Any, world: World) -> Any:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    words = (
        "import-openai",
        str(folder / "jobs.json"),
        "--out",
        str(folder / "out"),
        "--base",
        "tiny",
        "--json",
    )
    return luthier(world.home.path, *words)


def test_an_old_job_becomes_a_recipe_that_runs_and_what_is_lost_is_told(world: World, tmp_path: Path) -> None:
    (tmp_path / "file-train.jsonl").write_bytes(jsonl(chats(12)))
    (tmp_path / "file-valid").write_bytes(jsonl(chats(3, "valid")))
    dpo = {"id": "ftjob-2", "training_file": "file-train", "method": {"type": "dpo"}, "model": "gpt-4.1"}
    gone = OLD | {"id": "ftjob-3", "training_file": "file-gone", "odd": 1}
    done, wrong, missing = imported(tmp_path, {"data": [OLD, dpo, gone]}, world)
    assert any("gpt-4o-mini-2024-07-18" in line for line in done["told"])
    assert wrong["recipe"] is None and any("line 1" in line for line in wrong["told"])
    assert missing["recipe"] is None and any("file-gone.jsonl" in line for line in missing["told"])
    assert any("`odd`" in line for line in missing["told"])
    recipe = recipe_file.load(Path(done["recipe"]))
    phase = recipe.train[0]
    assert (recipe.seed, phase.epochs, phase.batch, round(phase.lr, 6)) == (42, 2, 3, 0.00036)
    said = luthier(world.home.path, "run", done["recipe"], "--json")
    assert said["status"] == "done" and said["stages"]["data"]["facts"]["rows"]["train"] == 12
