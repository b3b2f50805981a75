"""A user's mistakes, through the real command: the exit code, the place, what to do, never a traceback."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.world import LUTHIER, environment, luthier, make_world


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return make_world(tmp_path / "toy")


def wrong(recipe: Path, code: int, *words: str, verb: str = "plan") -> dict[str, Any]:
    said = luthier(recipe.parent / "home", verb, str(recipe), *words, "--json", code=code)
    error: dict[str, Any] = said["error"]
    return error


def edit(recipe: Path, change: Any) -> None:
    content = yaml.safe_load(recipe.read_text("utf-8"))
    change(content)
    recipe.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")


def test_a_malformed_line_is_named_by_file_and_line(recipe: Path) -> None:
    good = json.dumps(
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    )
    (recipe.parent / "rows.jsonl").write_text(f"{good}\n{{broken\n", "utf-8")

    def change(content: Any) -> None:
        source = content["data"]["sources"][0]
        source["from"]["files"] = {"train": "rows.jsonl"}
        del source["chat"], source["values"]

    edit(recipe, change)
    error = wrong(recipe, 3)
    assert "rows.jsonl:2" in (error["where"] or error["what"])


@pytest.mark.parametrize(
    ("turns", "word"),
    [
        (["assistant", "user", "assistant"], "user"),
        (["user", "user", "assistant"], "assistant"),
        (["user"], "assistant"),
    ],
)
def test_wrong_role_order_and_a_missing_answer_are_named(recipe: Path, turns: list[str], word: str) -> None:
    row = {"messages": [{"role": role, "content": "x"} for role in turns]}
    (recipe.parent / "rows.jsonl").write_text(json.dumps(row) + "\n", "utf-8")

    def change(content: Any) -> None:
        source = content["data"]["sources"][0]
        source["from"]["files"] = {"train": "rows.jsonl"}
        del source["chat"], source["values"]

    edit(recipe, change)
    error = wrong(recipe, 3)
    assert "rows.jsonl:1" in error["where"] and word in f"{error['what']} {error['hint']}"


def test_an_unknown_key_is_answered_with_the_nearest_right_one(recipe: Path) -> None:
    recipe.write_text(recipe.read_text("utf-8").replace("max_length", "max_lenght"), "utf-8")
    error = wrong(recipe, 2)
    assert "max_length" in str(error) and f"{recipe.name}:" in error["where"]
    assert "minimum" in str(wrong(recipe, 2, "--set", "release.gates.0.minimun=0.5"))


def test_an_unknown_licence_stops_the_run_before_sampling(recipe: Path) -> None:
    edit(recipe, lambda content: content["data"]["sources"][0].update(licence="dunno"))
    assert "dunno" in wrong(recipe, 3)["what"]


def test_a_package_that_is_not_the_pinned_one_or_cannot_be_had_is_refused(recipe: Path) -> None:
    def change(content: Any) -> None:
        source = content["data"]["sources"][0]
        source["from"] = {"name": "package", "package": "luthier-does-not-exist==9.9.9", "sha256": "0" * 64,
                          "files": {"train": "x.csv"}}  # fmt: skip

    edit(recipe, change)
    error = wrong(recipe, 11)
    assert "luthier-does-not-exist" in str(error) and error["hint"]


def test_a_run_that_cannot_fit_is_refused_with_what_would_fit(recipe: Path) -> None:
    error = wrong(recipe, 5, "--set", "plan.memory_gb=0.001")
    assert error["hint"]
    assert wrong(recipe, 5, "--set", "plan.max_length=16")["hint"]


def test_a_port_in_use_is_said_so(recipe: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = luthier(recipe.parent / "home", "serve", "--port", str(port), "--json", code=10)
    assert str(port) in said["error"]["what"]


def test_unknown_runs_models_and_homes_are_said_so(recipe: Path, tmp_path: Path) -> None:
    home = recipe.parent / "home"
    assert luthier(home, "show", "r-nope", "--json", code=9)["error"]["kind"] == "NotFound"
    assert luthier(home, "promote", "toy", "--json", code=9)["error"]["kind"] == "NotFound"
    assert luthier(home, "rollback", "toy", "--json", code=9)["error"]["kind"] == "NotFound"
    assert luthier(home, "releases", "toy", "--json", code=9)["error"]["kind"] == "NotFound"
    assert home.stat().st_mode & 0o077 == 0, "rows and requests are nobody else's"
    (tmp_path / "file").write_text("x")
    assert luthier(tmp_path / "file", "runs", "--json", code=8)["error"]["kind"] == "StoreError"
    assert luthier(home, "run", str(tmp_path / "no.yaml"), "--json", code=2)["error"]["kind"] == "RecipeError"


def test_a_full_disk_is_named_and_the_same_command_goes_on_when_there_is_room(
    recipe: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk to fill: mount says {mounted.stderr.decode().strip()}")
    try:
        said = luthier(disk, "run", str(recipe), "--json", code=8)
        assert "disk" in said["error"]["what"] or "space" in said["error"]["what"]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert luthier(disk, "run", str(recipe), "--json")["status"] == "done"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_help_is_quick_and_names_every_verb(tmp_path: Path) -> None:
    verbs = (
        "run",
        "plan",
        "runs",
        "show",
        "compare",
        "releases",
        "promote",
        "rollback",
        "serve",
        "chat",
        "lineage",
        "parts",
        "doctor",
    )
    done = subprocess.run(
        [*LUTHIER, "--help"], env=environment(tmp_path), capture_output=True, text=True, check=True
    )
    assert all(verb in done.stdout for verb in verbs)


def test_what_a_file_says_is_shown_and_not_obeyed(recipe: Path) -> None:
    (recipe.parent / "train.csv").write_text("[/foo],:x:,\x1b[31mred\n1,2,3\n")
    done = subprocess.run(
        [*LUTHIER, "plan", str(recipe)], env=environment(recipe.parent / "home"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3 and "[/foo], :x:" in done.stderr, done.stderr
    assert "\x1b[31mred" not in done.stderr and "\\x1b[31mred" in done.stderr
