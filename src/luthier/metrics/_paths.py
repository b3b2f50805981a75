"""Templates of graders: `{{ item.answer }}` becomes that value. Paths alone: no filters, no loops, no code.

Source: OpenAI's grader guide: `sample.output_text`, `sample.output_json.…` (the answer read as JSON) and
`item.…` (the row's fields), with dots for keys and `[n]` for places in a list. Replacement is a single pass,
so braces inside a value stay text. It does not know what a grader does with the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from luthier.errors import GraderError

LONGEST = 1_000_000  # characters of a filled template
_BRACES = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_PATH = re.compile(r"\s*(item|sample)((?:\.[\w-]+|\[\d{1,6}\])*)\s*")
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]")
_SAMPLE = ("output_text", "output_json")

Path = tuple[str | int, ...]


class BadTemplate(GraderError):
    """The template is not one: what stands in braces is no path."""

    flag = "invalid_variable_error"


class NoSuchPlace(GraderError):
    """The row has no such field."""

    flag = "invalid_variable_error"


class Unreadable(GraderError):
    """The answer is not what the grader wants to read: not JSON, or without the named place."""

    flag = "sample_parse_error"


def places(template: str) -> list[Path]:
    """Every path a template names; raise `BadTemplate` where braces hold something else."""
    return [_path(match[1]) for match in _BRACES.finditer(template)]


def fill(
    template: str, answer: str, item: Mapping[str, Any], wrap: Callable[[str], str] = lambda text: text
) -> str:
    """The template with its values put in, each through `wrap`."""
    length = 0

    def value(match: re.Match[str]) -> str:
        nonlocal length
        found = follow(_path(match[1]), answer, item, "item")
        text = wrap(found if isinstance(found, str) else json.dumps(found, ensure_ascii=False))
        length += len(text)
        if length > LONGEST:
            raise Unreadable(f"the filled template is longer than {LONGEST} characters")
        return text

    return _BRACES.sub(value, template)


def follow(path: Path, answer: str, item: Mapping[str, Any], where: str) -> Any:
    """The value at a path; `where` names the row in errors."""
    root, *steps = path
    if root == "item":
        return _walk(item, steps, "item", lambda what: NoSuchPlace(what, where=where))
    if steps[0] == "output_text":
        return answer
    return _walk(_json(answer), steps[1:], "sample.output_json", Unreadable)


def _path(text: str) -> Path:
    found = _PATH.fullmatch(text)
    if found is None:
        raise BadTemplate(
            f"{{{{{text}}}}} is no path",
            hint="write {{ sample.output_text }}, {{ sample.output_json.key }} or {{ item.key[0] }}",
        )
    steps = [step[1] if step[1] is not None else int(step[2]) for step in _STEP.finditer(found[2])]
    if found[1] == "sample" and (
        not steps or steps[0] not in _SAMPLE or (steps[1:] and steps[0] != _SAMPLE[1])
    ):
        raise BadTemplate(
            f"{{{{{text}}}}}: a sample has {' and '.join(_SAMPLE)}, and only the latter has parts"
        )
    return (found[1], *steps)


def _walk(value: Any, steps: list[Any], told: str, error: Callable[[str], GraderError]) -> Any:
    for step in steps:
        try:
            fits = isinstance(value, list if isinstance(step, int) else Mapping)
            value = value[step] if fits else None
        except (KeyError, IndexError):
            value = None
        told = f"{told}[{step}]" if isinstance(step, int) else f"{told}.{step}"
        if value is None:
            raise error(f"there is nothing at {told}")
    return value


def _json(answer: str) -> Any:
    try:
        return json.loads(answer, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"the answer is not JSON: {error}") from error


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON value")
