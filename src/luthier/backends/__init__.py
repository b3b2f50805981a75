"""Backends: tokens out of weights. One file is one way to have answers computed, with its own `Params`.

A part declares `Params` and `engine(params, limits, home)`, which gives what `serving.desk.Engine` describes:
the interface of `serving.worker.Worker`. Desk, router, canary, log and HTTP stand before each unchanged.
One that can judge offers `ask(params)` too.
`read` takes one as it is written on a command line. It does not know which part is in use.
"""

from __future__ import annotations

import yaml
from pydantic import TypeAdapter, ValidationError

from luthier import plugins
from luthier.errors import ServeError
from luthier.metrics import Ask
from luthier.plugins import Part


def read(text: str) -> Part:
    """The part that `NAME` or `{name: NAME, its: settings}` spells; `ServeError` says what is wrong."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ServeError(f"the backend cannot be read: {error}", hint="write '{name: vllm, …}'") from error
    try:
        part: Part = TypeAdapter(plugins.choice("backends")).validate_python(value)
    except plugins.PartInvalid as error:
        raise _invalid(error.error, f"backend {error.name}") from error
    except ValidationError as error:
        cause = (error.errors()[0].get("ctx") or {}).get("error")
        if isinstance(cause, plugins.PartInvalid):
            raise _invalid(cause.error, f"backend {cause.name}") from error
        raise _invalid(error, "backend") from error
    return part


def judges(part: Part) -> dict[str, Ask]:
    """The one model, by its name, that a part asks for whoever grades."""
    name = getattr(part.params, "model", None)
    if not hasattr(part.module, "ask") or not name:
        raise ServeError(
            f"the backend {part.name} is no judge",
            hint="write '{name: remote, url: …, model: …}'",
        )
    return {name: part.module.ask(part.params)}


def _invalid(error: ValidationError, where: str) -> ServeError:
    first = error.errors()[0]
    at = ".".join([where, *(str(step) for step in first["loc"])])
    return ServeError(str(first["msg"]).removeprefix("Value error, "), where=at)
