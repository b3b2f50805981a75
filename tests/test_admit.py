"""Base models get in through an ordinary run, once, and what cannot be tuned stays out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from luthier import admit, artifacts, bases, owners
from luthier.errors import ModelError, NotFound
from luthier.home import Home
from luthier.pipeline import Place
from luthier.store import ReleaseRecord, Store
from tests.tiny import make_tiny_base

GUARD = Path(__file__).parents[1] / "examples" / "guard.yaml"


def place(folder: Path) -> Place:
    home = Home.at(folder / "home")
    return Place(home, Store.open(home.path), folder)


def section(folder: Path) -> dict[str, object]:
    return admit.section_of(folder, "Apache-2.0")


def test_a_base_is_sealed_by_an_ordinary_run_and_found_by_its_name(tmp_path: Path) -> None:
    here = place(tmp_path)
    made = admit.base("Tiny-1.0", section(make_tiny_base(tmp_path / "tiny")), here)
    assert bases.find(here.store, "Tiny-1.0") == made == bases.listed(here.store)[0]
    about = artifacts.read_json(here.home.artifact(made.model) / "base.json")
    assert (made.base, made.facts["licence"], made.facts["context"]) == (about["digest"], "Apache-2.0", 2048)
    assert about["template_check"]["rows"] == len(admit.PROBE)
    run = here.store.runs()[0]
    assert (run.name, run.status) == ("base-tiny-1-0", "done")
    assert made.section["from"]["files"] == {"model": str(tmp_path / "tiny")}


def test_a_base_that_is_there_and_whole_is_not_made_again_a_damaged_one_is(tmp_path: Path) -> None:
    here = place(tmp_path)
    asked = section(make_tiny_base(tmp_path / "tiny"))
    made = admit.ready("tiny", asked, here)
    assert admit.ready("tiny", asked, here) == made and len(here.store.runs()) == 1
    shutil.rmtree(here.home.artifact(made.model))
    again = admit.ready("tiny", asked, here)
    assert (again.model, again.base) == (made.model, made.base)
    assert artifacts.verify(here.home.artifact(made.model)) == made.model


def test_a_base_whose_template_teaches_no_stop_is_refused(tmp_path: Path) -> None:
    here = place(tmp_path)
    folder = make_tiny_base(tmp_path / "tiny")
    template = folder / "chat_template.jinja"
    assert "<|im_end|>" in template.read_text()
    template.write_text(template.read_text().replace("<|im_end|>", ""))
    with pytest.raises(ModelError, match="stop"):
        admit.base("tiny", section(folder), here)
    assert bases.listed(here.store) == []


def test_names_of_bases_are_plain_and_never_a_releases(tmp_path: Path) -> None:
    here = place(tmp_path)
    for wrong in ("", "a:b", "a@b", "a/b", "-a", "x" * 65):
        with pytest.raises(ModelError):
            admit.base(wrong, {}, here)
    here.store.add_release(ReleaseRecord("d" * 64, "guard", None, True, {}))
    with pytest.raises(ModelError, match="name of a release"):
        bases.enter(here.store, bases.Entry("guard", {}, "m", "b", {}), "test")
    with pytest.raises(NotFound, match="no base model yet"):
        bases.find(here.store, "tiny")
    bases.enter(here.store, bases.Entry("Tiny", {}, "m", "b", {}), "test")
    with pytest.raises(NotFound, match="did you mean 'Tiny'"):
        bases.find(here.store, "tiny")


def test_the_demos_base_is_the_one_of_the_guard_example(tmp_path: Path) -> None:
    recipe = yaml.safe_load(GUARD.read_text("utf-8"))
    assert recipe["model"] == admit.DEMO_SECTION
    assert admit.section_of(GUARD, "") == json.loads(json.dumps(admit.DEMO_SECTION))


def test_a_recipes_relative_path_is_taken_from_the_recipes_folder(tmp_path: Path) -> None:
    recipe = yaml.safe_load(GUARD.read_text("utf-8"))
    recipe["model"]["from"] = {"name": "files", "files": {"model": "models/tiny"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    found = admit.section_of(tmp_path / "r.yaml", "")
    assert found["from"]["files"] == {"model": str(tmp_path / "models" / "tiny")}


def test_bases_are_added_and_listed_on_the_command_line(tmp_path: Path) -> None:
    folder = make_tiny_base(tmp_path / "tiny base")
    words = ["--home", str(tmp_path / "home"), "--json"]
    luthier = [sys.executable, "-m", "luthier.cli", "bases"]
    done = [
        subprocess.run([*luthier, *verb, *words], capture_output=True, text=True, check=False)
        for verb in (["add", "mine", str(folder)], ["list"], ["add", "a:b", str(folder)])
    ]
    assert [one.returncode for one in done] == [0, 0, 4], done[0].stderr
    made = json.loads(done[0].stdout.splitlines()[-1])
    assert made["name"] == "mine" and made["dtype"] == "float32" and made["licence"] == "LicenseRef-own"
    assert json.loads(done[1].stdout) == [made]
    assert "cannot be a base's name" in json.loads(done[2].stdout.splitlines()[-1])["error"]["what"]


def test_a_name_is_shared_on_the_command_line_and_taken_back(tmp_path: Path) -> None:
    here = place(tmp_path)
    here.store.add_release(ReleaseRecord("d" * 64, "guard", None, True, {}))
    luthier = [sys.executable, "-m", "luthier.cli", "share"]
    for words, code, shared in (
        (["guard"], 0, {"guard"}),
        (["guard", "--off"], 0, set()),
        (["gard"], 9, set()),
    ):
        done = subprocess.run(
            [*luthier, *words, "--home", str(here.home.path)], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert owners.shared(here.store) == shared
