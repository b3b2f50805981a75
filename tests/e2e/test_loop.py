"""Recipe → served reply → rollback, through the real command and the real HTTP door, on a tiny model."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import sqlite3
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.world import LUTHIER, environment, luthier, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """A home in which the toy recipe has run once: (recipe, home, what `run --json` said)."""
    folder = tmp_path_factory.mktemp("world")
    recipe, home = make_world(folder / "toy"), folder / "home"
    return recipe, home, luthier(home, "run", str(recipe), "--json")


def copy_of(world: tuple[Path, Path, dict[str, Any]], folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    recipe, home, said = world
    shutil.copytree(recipe.parent, folder / "toy")
    shutil.copytree(home, folder / "home")
    return folder / "toy" / recipe.name, folder / "home", said


def reused(said: dict[str, Any]) -> dict[str, bool]:
    return {stage: record["reused"] for stage, record in said["stages"].items()}


STAGES = ("data", "model", "plan", "train", "evaluate", "release", "monitor")


def test_a_run_leaves_seven_sealed_artefacts_a_release_and_a_report(world: Any) -> None:
    _, home, said = world
    assert tuple(said["stages"]) == STAGES
    assert not any(reused(said).values())
    for record in said["stages"].values():
        assert (home / "artifacts" / record["digest"] / "manifest.json").exists()
    assert said["status"] == "done"
    assert said["release"] == said["stages"]["release"]["digest"]
    assert Path(said["report"]).read_text("utf-8").startswith("<!")
    assert said["training"].keys() == {
        "useful_tokens",
        "train_seconds",
        "peak_rss_bytes",
        "loss_first",
        "loss_last",
    }
    assert said["training"]["loss_last"] < said["training"]["loss_first"]


def test_the_same_recipe_again_reuses_every_stage_in_under_ten_seconds(world: Any) -> None:
    recipe, home, first = world
    began = time.monotonic()
    again = luthier(home, "run", str(recipe), "--json")
    assert time.monotonic() - began < 10
    assert all(reused(again).values())
    assert again["release"] == first["release"]


def test_touching_one_training_row_reruns_data_and_everything_after_it(world: Any, tmp_path: Path) -> None:
    recipe, home, first = copy_of(world, tmp_path)
    rows = recipe.parent / "train.csv"
    rows.write_text(rows.read_text().replace("aaa t1 ", "aaa t1 x", 1))
    again = luthier(home, "run", str(recipe), "--json")
    assert not any(reused(again).values())
    assert again["stages"]["data"]["digest"] != first["stages"]["data"]["digest"]


def test_touching_a_gates_threshold_reruns_only_the_release_stage(world: Any, tmp_path: Path) -> None:
    recipe, home, first = copy_of(world, tmp_path)
    again = luthier(home, "run", str(recipe), "--set", "release.gates.0.minimum=0.31", "--json")
    assert [stage for stage, was in reused(again).items() if not was] == ["release"]
    assert again["release"] != first["release"]


def test_a_gate_that_refuses_stops_the_release_with_its_reason_and_exit_code_seven(
    world: Any, tmp_path: Path
) -> None:
    recipe, home, _ = copy_of(world, tmp_path)
    before = luthier(home, "releases", "--json")
    harder = "release.gates.0={name: floor, minimum: 0.99, bound: low}"  # 48 rows cannot prove that much
    said = luthier(home, "run", str(recipe), "--set", harder, "--json", code=7)
    assert said["error"]["kind"] == "GateRefused"
    assert "floor" in said["error"]["what"]
    after = luthier(home, "releases", "--json")
    refused = [release for release in after if not release["accepted"]]
    assert len(after) == len(before) + 1 and len(refused) == 1 and refused[0]["aliases"] == []
    luthier(home, "promote", f"toy@{refused[0]['digest'][:12]}", code=8)
    page = home / "runs" / luthier(home, "runs", "--json")[0]["run"] / "report.html"
    assert "refused" in page.read_text("utf-8")


def test_promote_and_rollback_are_one_row_each_and_take_under_a_second(world: Any, tmp_path: Path) -> None:
    import luthier as package

    recipe, home, first = copy_of(world, tmp_path)
    second = luthier(home, "run", str(recipe), "--set", "release.gates.0.minimum=0.32", "--json")["release"]

    def refs() -> int:
        with sqlite3.connect(home / "luthier.db") as database:
            return int(database.execute("select count(*) from refs").fetchone()[0])

    package.promote(f"toy@{first['release'][:12]}", home=home)
    count = refs()
    for verb in (lambda: package.promote("toy", home=home), lambda: package.rollback("toy", home=home)):
        began = time.monotonic()
        verb()
        assert time.monotonic() - began < 1.0
        assert refs() == (count := count + 1)
    by_alias = {alias: row["digest"] for row in package.releases(home=home) for alias in row["aliases"]}
    assert by_alias == {"production": first["release"], "staging": second}
    with pytest.raises(package.LuthierError, match="stands on its first release"):
        package.rollback("toy", home=home)
    again = package.promote(f"toy@{first['release'][:12]}", home=home)
    assert not again["moved"] and refs() == count


def test_the_audit_log_names_the_run_and_the_person_behind_each_move(world: Any, tmp_path: Path) -> None:
    _, home, first = copy_of(world, tmp_path)
    luthier(home, "promote", f"toy@{first['release'][:12]}")
    luthier(home, "share", "toy")
    found = luthier(home, "audit", "show", "--json")
    person = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    assert [(entry["action"], entry["target"], entry["actor"]) for entry in found] == [
        ("move alias", "toy@staging", f"pipeline:{first['run']}"),
        ("move alias", "toy@production", person),
        ("share", "toy", person),
    ]
    luthier(home, "audit", "verify")


def test_a_running_server_answers_and_follows_promotions_without_a_restart(
    world: Any, tmp_path: Path
) -> None:
    recipe, home, first = copy_of(world, tmp_path)
    luthier(home, "promote", "toy")
    second = luthier(home, "run", str(recipe), "--set", "release.gates.0.minimum=0.33", "--json")["release"]
    server = subprocess.Popen(
        [*LUTHIER, "serve", "--port", "0", "--json"], env=environment(home), stdout=subprocess.PIPE, text=True
    )
    try:
        service = json.loads(server.stdout.readline())  # type: ignore[union-attr]
        assert service.keys() >= {"url", "key"}
        assert ask(service, "toy")[1] == first["release"]
        luthier(home, "promote", f"toy@{second[:12]}")
        assert ask(service, "toy@production")[1] == second
        luthier(home, "rollback", "toy")
        answer, release = ask(service, "toy")
        assert release == first["release"]
        assert answer["choices"][0]["message"]["role"] == "assistant"
    finally:
        server.terminate()
        assert server.wait(30) == 0
    report = luthier(home, "monitor", "toy", "--json")
    assert report["volume"]["requests"] == 2


def ask(service: dict[str, str], model: str) -> tuple[dict[str, Any], str]:
    time.sleep(1.0)  # alias moves are promised within a second
    body = {"model": model, "messages": [{"role": "user", "content": "aaa x"}], "max_tokens": 6}
    request = urllib.request.Request(
        f"{service['url']}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {service['key']}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer), answer.headers["x-luthier-release"]


def test_lineage_leads_from_a_row_to_the_live_alias_and_back(world: Any) -> None:
    _, home, first = world
    release = luthier(home, "lineage", "toy@staging", "--json")
    assert release["release"] == first["release"]
    assert release["data"]["artefact"] == first["stages"]["data"]["digest"]
    rows = home / "artifacts" / release["data"]["artefact"] / "rows" / "train.jsonl"
    row = json.loads(rows.read_text("utf-8").splitlines()[0])["id"]
    found = luthier(home, "lineage", row, "--json")["learnt_by"]
    assert [entry["release"] for entry in found] == [first["release"]]
    assert "staging" in found[0]["aliases"]


def test_chat_answers_without_a_server_and_every_reading_verb_draws(world: Any) -> None:
    _, home, first = world
    assert luthier(home, "chat", "toy@staging", "--message", "aaa x", "--max-tokens", "4").strip()
    for words in (
        ("runs",),
        ("show", first["run"]),
        ("releases",),
        ("parts",),
        ("lineage", "toy@staging"),
        ("doctor",),
    ):
        assert luthier(home, *words).strip()
    assert "shared rows" in luthier(home, "compare", first["run"], first["run"])


def test_a_stranger_loads_the_adapter_with_plain_peft(world: Any) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, home, first = world
    artefacts = home / "artifacts"
    base = AutoModelForCausalLM.from_pretrained(artefacts / first["stages"]["model"]["digest"] / "base")
    model = PeftModel.from_pretrained(base, str(artefacts / first["release"] / "adapter"))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
