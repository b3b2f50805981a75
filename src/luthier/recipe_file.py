"""A recipe from a file: YAML to `Recipe`, with every mistake shown at its line and the nearest right name.

Source: YAML 1.2's core schema, so `no` is a word and `5e-4` a number. Keys are always their literal text
(`0: safe` maps the text "0"). Keys given twice, anchors and tags are refused: a recipe says what it says.
`--set a.0.b=value` changes one value after the file is read; the value is YAML too.
This module does not know what any field means; `recipe` and the parts do.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from luthier import plugins
from luthier.errors import RecipeError
from luthier.plugins import PartInvalid
from luthier.recipe import Recipe

LARGEST_BYTES = 256 * 1024
DEPTH = 32
SHOWN = 10
Loc = tuple[str | int, ...]
Places = dict[Loc, str]

_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, change and validate a recipe; raise `RecipeError` naming `file:line` of every mistake."""
    places: Places = {}
    value = _parsed(_text(Path(path)), str(path), places)
    if not isinstance(value, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=f"{path}:1")
    for override in overrides:
        _set(value, override, places)
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        raise _explained(error, places, str(path)) from None


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot be read: {error.strerror}", where=str(path), hint="give the recipe's path"
        ) from error
    if len(data) > LARGEST_BYTES:
        raise RecipeError(f"larger than {LARGEST_BYTES // 1024} KiB; is this a recipe?", where=str(path))
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError("not UTF-8", where=f"{path}:{line}", hint="save the file as UTF-8") from error


# ---- YAML with places ------------------------------------------------------------------------------


def _parsed(text: str, name: str, places: Places, prefix: Loc = (), line: bool = True) -> Any:
    """The value of a YAML text; `places` learns where each part of it stands."""
    try:
        _plain(text, name, line)
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        problem = " ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"not YAML: {problem}", where=_at(name, error.problem_mark, line)) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"not YAML: {str(error).splitlines()[0]}", where=name) from error
    return None if node is None else _value(node, prefix, _Reader(name, places, line))


def _plain(text: str, name: str, line: bool) -> None:
    """Refuse what a recipe does not need: aliases, tags and depth."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        here = _at(name, event.start_mark, line)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError("anchors and aliases are not used in recipes", where=here)
        if tag := getattr(event, "tag", None):
            hint = "a recipe names parts, never code"
            raise RecipeError(f"the tag {tag!r} is not used in recipes", where=here, hint=hint)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise RecipeError(f"nested deeper than {DEPTH}", where=here)


class _Reader:
    """Where we are reading, for places."""

    def __init__(self, name: str, places: Places, line: bool) -> None:
        self.name, self.places, self.line = name, places, line


def _at(name: str, mark: Any, line: bool) -> str:
    return f"{name}:{mark.line + 1}" if line and mark is not None else name


def _value(node: Any, loc: Loc, reader: _Reader) -> Any:
    here = _at(reader.name, node.start_mark, reader.line)
    reader.places.setdefault(loc, here)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*loc, n), reader) for n, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, item in node.value:
            place = _at(reader.name, key.start_mark, reader.line)
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError("a key must be a word", where=place)
            if key.value in found:
                raise RecipeError(f"the key {key.value!r} stands twice", where=place, hint="keep one of them")
            reader.places[(*loc, key.value)] = place
            found[key.value] = _value(item, (*loc, key.value), reader)
        return found
    return _scalar(node)


def _scalar(node: yaml.ScalarNode) -> Any:
    text: str = node.value
    if node.style is not None:  # quoted or a block: always text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) and len(text) < 20:
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) and not _INT.fullmatch(text) else text


# ---- --set -------------------------------------------------------------------------------------------


def _set(recipe: dict[str, Any], override: str, places: Places) -> None:
    """Change one value: walk the path, make what is missing, put the value."""
    path, equals, text = override.partition("=")
    steps = path.strip().split(".")
    where = f"--set {override}"
    if not equals or not all(steps):
        raise RecipeError("write it as path=value", where=where, hint="for example --set train.0.lr=2e-4")
    holder: Any = recipe
    loc: Loc = ()
    for n, step in enumerate(steps):
        last = n == len(steps) - 1
        key = _key(holder, step, ".".join(steps[:n]) or "the recipe", where)
        loc = (*loc, key)
        if last:
            for known in [known for known in places if known[: len(loc)] == loc]:
                del places[known]
            places[loc] = where
            value = _parsed(text, where, places, loc, line=False)
            if isinstance(holder, list) and key == len(holder):
                holder.append(value)
            else:
                holder[key] = value
            return
        holder = _below(holder, key, places, loc, where)


def _key(holder: Any, step: str, name: str, where: str) -> str | int:
    if not isinstance(holder, list):
        return step
    if not step.isascii() or not step.isdigit() or int(step) > len(holder):
        raise RecipeError(f"{name} is a list of {len(holder)}; {step!r} is no position in it", where=where)
    return int(step)


def _below(holder: Any, key: str | int, places: Places, loc: Loc, where: str) -> Any:
    """What stands at `key`, made if it is missing; a part written as a bare name becomes `{name: …}`."""
    missing = key == len(holder) if isinstance(holder, list) else holder.get(key) is None
    if missing:
        places[loc] = where
        if isinstance(holder, list):
            holder.append({})
        else:
            holder[key] = {}
    elif isinstance(holder[key], str):
        holder[key] = {"name": holder[key]}
    elif not isinstance(holder[key], dict | list):
        raise RecipeError(
            f"{'.'.join(map(str, loc))} is {holder[key]!r}, which has nothing below it", where=where
        )
    return holder[key]


# ---- explanations ------------------------------------------------------------------------------------


def _explained(error: ValidationError, places: Places, name: str) -> RecipeError:
    """One error that shows every mistake, each as `place: key: what`, in the order of the file."""
    found = sorted(set(_mistakes(error, (), Recipe, places, name)), key=lambda item: (_line(item[0]), item))
    shown = [f"{key}: {what}" if key else what for _, key, what in found]
    lines = [shown[0], *(f"{found[n][0]}: {shown[n]}" for n in range(1, min(len(found), SHOWN)))]
    if len(found) > SHOWN:
        lines.append(f"… and {len(found) - SHOWN} more")
    return RecipeError("\n".join(lines), where=found[0][0])


def _line(place: str) -> int:
    tail = place.rpartition(":")[2]
    return int(tail) if tail.isdigit() else 0


def _mistakes(
    error: ValidationError, above: Loc, model: type[BaseModel], places: Places, name: str
) -> Iterator[tuple[str, str, str]]:
    items = error.errors(include_url=False)
    for item in items:
        below = any(other["loc"][: len(item["loc"])] == item["loc"] for other in items if other is not item)
        if item["type"] == "too_short" and below:  # pydantic does not count what it could not read
            continue
        cause = item.get("ctx", {}).get("error")
        loc: Loc = (*above, *item["loc"])
        if isinstance(cause, PartInvalid):
            params = plugins.load(cause.family, cause.name).Params
            yield from _mistakes(cause.error, loc, params, places, name)
        else:
            yield _place(loc, places, name), ".".join(map(str, loc)), _what(item, model)


def _what(item: Any, model: type[BaseModel]) -> str:
    kind, loc = item["type"], item["loc"]
    if kind == "missing":
        return "is required, and missing"
    if kind == "extra_forbidden":
        return plugins.unknown("key", str(loc[-1]), _fields(model, loc[:-1]))
    if kind == "literal_error":
        given = str(item["input"])
        near = difflib.get_close_matches(
            given, re.findall(r"'([^']*)'", item["ctx"]["expected"]), n=1, cutoff=0.5
        )
        guess = f"; did you mean {near[0]!r}?" if near else ""
        return f"{given!r} is not {item['ctx']['expected']}{guess}"
    message = str(item["msg"]).removeprefix("Value error, ")
    given = repr(item["input"])
    short = kind == "value_error" or isinstance(item["input"], dict | list) or len(given) > 80
    return message if short else f"{message} (given: {given})"


def _place(loc: Loc, places: Places, name: str) -> str:
    """Where the key stands, or the nearest thing above it."""
    for length in range(len(loc), 0, -1):
        if loc[:length] in places:
            return places[loc[:length]]
    return places.get((), f"{name}:1")


def _fields(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys that may stand at `loc` of a model, by the names a recipe uses."""
    at: type[BaseModel] | None = model
    for step in loc:
        if isinstance(step, int) or at is None:
            continue
        field = next((f for key, f in at.model_fields.items() if step in (key, f.alias)), None)
        at = _model_in(field.annotation) if field else None
    return [field.alias or key for key, field in at.model_fields.items()] if at else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside `X | None`, `tuple[X, ...]` or `Annotated[X, …]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, types.UnionType, Annotated):
        return next((found for inner in get_args(annotation) if (found := _model_in(inner))), None)
    return None
