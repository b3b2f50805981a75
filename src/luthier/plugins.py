"""The folder is the registry: a part is one file on a shelf, found by its name and loaded when asked for.

A shelf (family) is a package folder such as `luthier/gates`; every module in it that does not begin with
an underscore is a part. A part declares `class Params(plugins.Params)` beside its behaviour, so a recipe's
`{name: floor, minimum: 0.94}` is validated by the very file that will act on it. A part may declare
`VERSION` (default 1): raising it makes every stage that used the part run again.

This module does not know what any part does, and loads none until it is named.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer, PlainValidator, ValidationError

FAMILIES = ("sources", "objectives", "methods", "metrics", "baselines", "gates", "backends")


class Params(BaseModel):
    """The knobs of one part: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Part:
    """A part as a recipe names it: the family, the name, and its validated `Params`."""

    __slots__ = ("family", "name", "params")

    def __init__(self, family: str, name: str, params: Params) -> None:
        self.family, self.name, self.params = family, name, params

    @property
    def module(self) -> ModuleType:
        return load(self.family, self.name)

    @property
    def version(self) -> int:
        return int(getattr(self.module, "VERSION", 1))

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.params.model_dump(mode="json", by_alias=True)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Part) and (self.family, self.as_dict()) == (other.family, other.as_dict())

    def __hash__(self) -> int:
        return hash((self.family, self.name))

    def __repr__(self) -> str:
        return f"{self.family}/{self.name}({self.params!r})"


@cache
def names(family: str) -> tuple[str, ...]:
    """Every part on a shelf, by file name alone: nothing is imported."""
    if family not in FAMILIES:
        raise ValueError(f"no family {family!r}; there are {', '.join(FAMILIES)}")
    shelf = Path(__file__).parent / family
    return tuple(sorted(path.stem for path in shelf.glob("*.py") if not path.stem.startswith("_")))


def load(family: str, name: str) -> ModuleType:
    """Import one part. Only names found on the shelf are importable: a recipe can never name code."""
    if name not in names(family):
        raise ValueError(unknown(f"{family[:-1]}", name, names(family)))
    return importlib.import_module(f"luthier.{family}.{name}")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name nobody knows: what it was, the nearest right one, and all there are."""
    options = [str(option) for option in known]  # a name of an enum is read as its value
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{guess} (known: {', '.join(options)})"


def choice(family: str) -> Any:
    """The type of a recipe field that takes one part of `family`, written `{name: …, its own params}`."""

    def read(value: object) -> Part:
        if isinstance(value, Part):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(f"write {{name: …}} with one of: {', '.join(names(family))}")
        settings = {key: item for key, item in value.items() if key != "name"}
        module = load(family, value["name"])
        try:
            return Part(family, value["name"], module.Params.model_validate(settings))
        except ValidationError as error:
            raise PartInvalid(family, value["name"], error) from error

    return Annotated[
        Part, PlainValidator(read), PlainSerializer(lambda part: part.as_dict(), return_type=dict)
    ]


class PartInvalid(ValueError):
    """A part's own `Params` refused the recipe's settings; `errors` keeps pydantic's list for the reader."""

    def __init__(self, family: str, name: str, error: ValidationError) -> None:
        super().__init__(f"{family[:-1]} {name!r}: {error.error_count()} invalid setting(s)")
        self.family, self.name, self.error = family, name, error
