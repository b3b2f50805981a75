from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import recipe_file
from luthier.errors import RecipeError
from luthier.recipe import Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
TEXT = """\
luthier: 1
name: toy
data:
  sources:
    - from: {name: files, files: {all: rows.jsonl}}
      licence: MIT
      purpose: tests
      chat: {user: "{text}", assistant: "{label}"}
      values:
        label: {0: no, 1: yes}
model:
  from:
    name: files
    files: {model: base}
  licence: Apache-2.0
train:
  - steps: 10
    lr: 5e-4
    method: lora
evaluate:
  labels: [no, yes]
  positive: yes
release:
  gates:
    - {name: floor, minimum: 0.9}
    - parity
  intended_use: tests
  limits: none known
"""


def load(tmp_path: Path, text: str = TEXT, overrides: Sequence[str] = ()) -> Recipe:
    path = tmp_path / "toy.yaml"
    path.write_text(text, "utf-8")
    return recipe_file.load(path, overrides)


def refused(tmp_path: Path, text: str, overrides: Sequence[str] = ()) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, overrides)
    return caught.value


def line_of(part: str, text: str = TEXT) -> int:
    return text[: text.index(part)].count("\n") + 1


def test_a_recipe_is_read_with_plain_words_and_numbers(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    assert recipe.evaluate.labels == ("no", "yes") and recipe.train[0].lr == 5e-4
    assert recipe.data.sources[0].values == {"label": {"0": "no", "1": "yes"}}
    assert recipe.train[0].method.name == "lora" and recipe.release.gates[1].name == "parity"


def test_a_resolved_recipe_read_again_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    again = load(tmp_path, yaml.safe_dump(recipe.as_dict()))
    assert again.as_dict() == recipe.as_dict()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("licence: MIT", "license: MIT", "sources.0.license: unknown key 'license'; did you mean 'licence'"),
        ("purpose: tests", "purpose: ''", "data.sources.0.purpose: String should have at least 1"),
        ("steps: 10", "steps: ten", "train.0.steps: Input should be a valid integer"),
        ("lr: 5e-4", "schedule: cosin", "did you mean 'cosine'"),
        ("minimum: 0.9", "minimun: 0.9", "gates.0.minimun: unknown key 'minimun'; did you mean 'minimum'"),
        ("name: floor", "name: flor", "unknown gate 'flor'; did you mean 'floor'"),
        ("method: lora", "method: {name: lora, rr: 3}", "method.rr: unknown key 'rr'; did you mean 'r'"),
        ("method: lora", "epochs: 3", "give exactly one of `steps` and `epochs`"),
        ("positive: yes", "positive: maybe", "which is not in `labels`"),
        ("name: toy", "name: Toy!", "name: String should match pattern"),
        ("{user:", "{usr: x, user:", "chat.usr: unknown key 'usr'; did you mean 'user'"),
        ("luthier: 1", "luthier: 2", "luthier: '2' is not 1"),
        ("name: toy", "nam: toy", "unknown key 'nam'; did you mean 'name'"),
    ],
)  # fmt: skip
def test_a_mistake_is_shown_at_its_line_with_the_nearest_right_name(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    text = TEXT.replace(old, new, 1)
    error = refused(tmp_path, text)
    assert words in error.what, error.what
    first = f"{tmp_path}/toy.yaml:{line_of(new, text)}"
    assert first == error.where or first in error.what or "exactly one" in words or "labels" in words


def test_a_missing_key_is_shown_where_it_should_stand(tmp_path: Path) -> None:
    error = refused(tmp_path, TEXT.replace("  limits: none known\n", ""))
    assert error.what == "release.limits: is required, and missing"
    assert error.where == f"{tmp_path}/toy.yaml:{line_of('release:')}"


def test_every_mistake_is_shown_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path, TEXT.replace("licence: MIT", "license: MIT").replace("minimum", "minimun"))
    lines = error.what.splitlines()
    assert len(lines) == 4 and "licence" in lines[0] and "minimum" in lines[2]
    assert f"toy.yaml:{line_of('- {name: floor')}" in lines[2]


@pytest.mark.parametrize(
    ("text", "words", "line"),
    [
        ("a: 1\na: 2\n", "'a' stands twice", 2),
        ("a: {b: 1, b: 2}\n", "'b' stands twice", 1),
        ("a: [1\nb: 2\n", "not YAML", 2),
        ("a: &x 1\nb: *x\n", "anchors and aliases", 1),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", "python/object/apply:os.system' is not used", 2),
        ("a: !secret x\n", "tag '!secret' is not used", 1),
        ("- a\n", "mapping of keys", 1),
        ("", "mapping of keys", 1),
        ("? [a]\n: 1\n", "a key must be a word", 1),
        ("a: " + "[" * 3000, "nested deeper", 1),
        ("- " * 3000 + "x", "nested deeper", 1),
        ("a: \x00\n", "not YAML", None),
    ],
)
def test_what_is_no_plain_yaml_is_refused(tmp_path: Path, text: str, words: str, line: int | None) -> None:
    error = refused(tmp_path, text)
    assert words in error.what
    assert error.where == f"{tmp_path}/toy.yaml{'' if line is None else f':{line}'}"


def test_a_file_that_cannot_be_a_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe_file.load(tmp_path / "no.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipe_file.load(tmp_path)
    path = tmp_path / "b.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RecipeError, match="not UTF-8") as caught:
        recipe_file.load(path)
    assert caught.value.where == f"{path}:2"
    path.write_bytes(b"#" * 300_000)
    with pytest.raises(RecipeError, match="larger than"):
        recipe_file.load(path)


def test_overrides_change_make_append_and_open_parts(tmp_path: Path) -> None:
    changes = [
        "train.0.lr=1e-3",
        "plan.max_length=64",
        "release.gates.2={name: no_regression}",
        "train.0.method.r=4",
    ]
    recipe = load(tmp_path, overrides=[*changes, "evaluate.labels=[no, yes, maybe]", "name=other"])
    assert recipe.train[0].lr == 1e-3 and recipe.plan.max_length == 64 and recipe.name == "other"
    assert recipe.release.gates[2].name == "no_regression" and recipe.train[0].method.params.r == 4
    assert recipe.evaluate.labels == ("no", "yes", "maybe")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.0.lr", "path=value"),
        ("=3", "path=value"),
        ("a..b=3", "path=value"),
        ("train.7.lr=3", "'7' is no position"),
        ("train.first.lr=3", "'first' is no position"),
        ("seed.x=3", "valid integer"),
        ("luthier.x=3", "nothing below it"),
        ("plan.max_lenght=64", "did you mean 'max_length'"),
        ("train.0.lr=fast", "valid number"),
        ("train.0.lr=[1", "not YAML"),
        ("train.0.lr=&a 1", "anchors"),
        ("train.0={steps: 1, steps: 2}", "stands twice"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, words: str) -> None:
    error = refused(tmp_path, TEXT, [override])
    assert words in error.what, error.what
    assert error.where == f"--set {override}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PATHS = st.sampled_from(
    [
        "data",
        "data.sources",
        "data.sources.0",
        "data.sources.0.from",
        "data.sources.0.values",
        "model",
        "seed",
    ]
) | st.sampled_from(
    [
        "train",
        "train.0",
        "train.0.method",
        "train.0.steps",
        "release.gates",
        "release.gates.0",
        "evaluate.labels",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PATHS, JSON)
def test_any_value_anywhere_is_a_recipe_or_a_recipe_error(tmp_path: Path, path: str, value: Any) -> None:
    content: Any = copy.deepcopy(yaml.safe_load(TEXT))
    at = content
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    for step in steps:
        at = at[step]
    at[last] = value
    try:
        load(tmp_path, yaml.safe_dump(content, allow_unicode=True))
    except RecipeError as error:
        assert error.where


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_is_a_recipe(path: Path) -> None:
    recipe = recipe_file.load(path)
    assert recipe.release.gates and all(part.module for part in recipe.parts("release"))
