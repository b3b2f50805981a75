"""Asks, targets, events and errors as JSON values and back, for the two sides of an engine process.

Plain data is described by its own types (pydantic reads the dataclasses), so a field that is added to one
of them travels too. An error travels as the name of its class and its words; a class the other side does
not know becomes `EngineFailed`. It does not know sockets.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

from pydantic import TypeAdapter

from luthier.errors import LuthierError
from luthier.serving.limits import Counts
from luthier.serving.router import Target
from luthier.serving.worker import Ask, EngineFailed, Event, Failed, Heard

ASK, TARGET, COUNTS = TypeAdapter(Ask), TypeAdapter(Target), TypeAdapter(Counts)
EVENTS: dict[str, TypeAdapter[Any]] = {kind.__name__: TypeAdapter(kind) for kind in get_args(Heard)}
NOTHING = Counts(**{field.name: 0 for field in fields(Counts)})


def from_ask(ask: Ask) -> Any:
    return ASK.dump_python(ask, mode="json")


def to_ask(plain: Any) -> Ask:
    return ASK.validate_python(plain)


def from_target(target: Target) -> Any:
    return TARGET.dump_python(target, mode="json")


def to_target(plain: Any) -> Target:
    return TARGET.validate_python(plain)


def from_counts(counts: Counts) -> Any:
    return COUNTS.dump_python(counts, mode="json")


def to_counts(plain: Any) -> Counts:
    return COUNTS.validate_python(plain)


def from_event(event: Event) -> Any:
    if isinstance(event, Failed):
        return ["Failed", from_error(event.error)]
    name = type(event).__name__
    return [name, EVENTS[name].dump_python(event, mode="json")]


def to_event(plain: Any) -> Event:
    name, value = plain
    if name == "Failed":
        return Failed(to_error(value))
    event: Heard = EVENTS[name].validate_python(value)
    return event


def from_error(error: LuthierError) -> Any:
    return [type(error).__name__, error.what, error.where, error.hint]


def to_error(plain: Any) -> LuthierError:
    name, what, where, hint = plain
    return _kinds().get(name, EngineFailed)(what, where=where, hint=hint)


def _kinds() -> dict[str, type[LuthierError]]:
    found: dict[str, type[LuthierError]] = {}
    families: list[type[LuthierError]] = [LuthierError]
    while families:
        kind = families.pop()
        if kind.__init__ is LuthierError.__init__:  # others need more than words to be made
            found[kind.__name__] = kind
        families += kind.__subclasses__()
    return found
