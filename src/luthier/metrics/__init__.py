"""Metrics: a score for one answer. One file is one rule, with its source and its own `Params`.

A part declares `Params`, `templates(params)` (the texts in it that name places, so that they can be tried on
a row before anything is trained) and a pure `score(answer, item, params, ask) -> float`: what the model said,
the fields of the row it was asked with, and, for a rule that asks a model, the way to ask it. A score serves
evaluation and, as a reward, `NEEDS = {"rollouts"}` objectives.

Source: the graders of OpenAI's fine-tuning API (https://developers.openai.com/api/docs/guides/graders);
`read` takes one in that form. Graders that are programs are refused: a recipe never names code. This module
does not know models, rows or rewards' use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from luthier import plugins
from luthier.errors import GraderError
from luthier.metrics import _paths
from luthier.plugins import Part

REFUSED = {
    "python": "it runs a program, and luthier runs no code that a request or recipe brings",
    "endpoint": "it sends answers to another host, and nothing leaves this machine",
    "label_model": "OpenAI's jobs take no label as a reward; use score_model, or string_check on the label",
}


@dataclass(frozen=True)
class Question:
    """What a rule wants a model to answer: turns as (role, text), how to sample, and how long to wait."""

    model: str
    turns: tuple[tuple[str, str], ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    within_s: float | None = None


Ask = Callable[[Question], str]


def read(grader: object, where: str = "grader") -> Part:
    """A part from OpenAI's form `{type, name, …}`; raise `GraderError` naming what is wrong with it."""
    if not isinstance(grader, Mapping):
        raise GraderError("a grader is an object with `type` and `name`", where=where)
    settings = dict(grader)
    kind, label = settings.pop("type", None), settings.pop("name", "")
    if not isinstance(kind, str):
        raise GraderError("`type` is missing", where=where, hint=f"known: {', '.join(_offered())}")
    if kind in REFUSED:
        raise GraderError(f"graders of type {kind!r} are not taken: {REFUSED[kind]}", where=f"{where}.type")
    if kind not in plugins.names("metrics"):
        raise GraderError(plugins.unknown("grader type", kind, _offered()), where=f"{where}.type")
    if not isinstance(label, str):
        raise GraderError("`name` must be text", where=f"{where}.name")
    if kind == "multi":
        settings["graders"] = _members(settings.get("graders"), where)
    module = plugins.load("metrics", kind)
    try:
        return Part("metrics", kind, module.Params.model_validate(settings | {"label": label}))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join([where, *(str(step) for step in first["loc"])])
        raise GraderError(str(first["msg"]).removeprefix("Value error, "), where=at) from error


def write(part: Part) -> dict[str, Any]:
    """The part in OpenAI's form, with every default filled in."""
    settings = part.as_dict()
    form = {"type": settings.pop("name"), "name": settings.pop("label")}
    if part.name == "multi":
        settings["graders"] = {name: write(member) for name, member in part.params.graders.items()}  # type: ignore[attr-defined]
    return form | {name: value for name, value in settings.items() if value is not None}


def check(part: Part, item: Mapping[str, Any], where: str) -> None:
    """Raise `GraderError` naming the row if the rule reads a field that the row does not have."""
    for template in part.module.templates(part.params):
        for path in _paths.places(template):
            if path[0] == "item":
                _paths.follow(path, "", item, where)


def score(part: Part, answer: str, item: Mapping[str, Any], ask: Ask) -> float:
    """The part's score for one answer."""
    found: float = part.module.score(answer, item, part.params, ask)
    return found


def reward(part: Part, answer: str, item: Mapping[str, Any], ask: Ask) -> tuple[float, bool]:
    """The score as a reward, and whether the rule could read the answer: one it cannot read earns nothing."""
    try:
        return score(part, answer, item, ask), True
    except _paths.Unreadable:
        return 0.0, False


def nobody(question: Question) -> str:
    """The `ask` of a place where there is no model to ask."""
    raise GraderError(f"there is no model {question.model!r} to ask here")


def _members(graders: object, where: str) -> dict[str, Any]:
    """OpenAI's client types `graders` as one grader, its guide as an object of named ones: take both."""
    if not isinstance(graders, Mapping) or not graders:
        raise GraderError("`graders` must be an object of named graders", where=f"{where}.graders")
    if isinstance(graders.get("type"), str):
        graders = {str(graders.get("name", "")): graders}
    return {str(name): read(member, f"{where}.graders.{name}") for name, member in graders.items()}


def _offered() -> list[str]:
    return [name for name in plugins.names("metrics")]
