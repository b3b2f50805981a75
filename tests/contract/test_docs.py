"""What README and CONTRIBUTING show is what the code does: their examples are taken out and run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from typer.main import get_command

from luthier import cli, errors, plugins, recipe_file
from tests.gates.evidence import evidence

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")


def block(text: str, kind: str) -> str:
    found = re.search(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"no {kind} block"
    return found.group(1)


def test_readmes_recipe_is_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(block(README, "yaml"), "utf-8")
    recipe = recipe_file.load(tmp_path / "recipe.yaml")
    assert recipe.name == "guard" and recipe.train[0].method.name == "lora"


def test_contributings_gate_is_a_gate(tmp_path: Path) -> None:
    (tmp_path / "latency.py").write_text(block(CONTRIBUTING, "python"), "utf-8")
    gate = runpy.run_path(str(tmp_path / "latency.py"))
    assert issubclass(gate["Params"], plugins.Params)
    seen = evidence(efficiency={"latency": {"p95": 0.4}})
    assert gate["check"](gate["Params"](), seen).passed
    assert not gate["check"](gate["Params"](p95_s=0.3), seen).passed


def test_readmes_exit_codes_are_the_codes_of_the_errors() -> None:
    told = {int(code) for code in re.findall(r"(?:^|· )(\d+) ", README.split("## Exit codes\n")[1])}
    assert told == {0, 70, *(kind.exit_code for kind in errors.every())}


def test_readme_names_every_verb_and_no_other() -> None:
    verbs = set(get_command(cli.app).commands)  # type: ignore[attr-defined]
    shown = set(re.findall(r"^luthier ([\w-]+)", block(README.split("## By hand")[1], ""), re.MULTILINE))
    listed = set(re.findall(r"`([\w-]+)`", README.split("The other verbs are")[1].split(";")[0]))
    assert shown | listed == verbs
