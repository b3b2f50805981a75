"""The error vocabulary: one class per boundary, each with an exit code, an HTTP code and a hint.

A message says what went wrong, where, and what to do next. Code raises one of these where the cause is
known; only the doors (`cli`, `http`) catch them. This module does not know any other module of luthier.
"""

from __future__ import annotations


class LuthierError(Exception):
    """Something a user can act on. `where` is a place they can open; `hint` is the next thing to do."""

    exit_code = 1
    http_code = 500

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.hint)


def _rebuild(kind: type[LuthierError], what: str, where: str | None, hint: str | None) -> LuthierError:
    return kind(what, where=where, hint=hint)


class RecipeError(LuthierError, ValueError):
    """The recipe, or a `--set` on top of it, cannot be understood."""

    exit_code = 2
    http_code = 400


class DataError(LuthierError, ValueError):
    """A row, file, licence or split of the training data is not usable as declared."""

    exit_code = 3
    http_code = 422


class GraderError(DataError):
    """A grader cannot be read, or cannot score this answer. `flag` is OpenAI's name for the kind."""

    http_code = 400
    flag = "other_error"


class ModelError(LuthierError):
    """The base model, its tokenizer or its chat template cannot be used."""

    exit_code = 4
    http_code = 422


class PlanError(LuthierError):
    """The run cannot fit this machine or this budget."""

    exit_code = 5
    http_code = 422


class TrainError(LuthierError):
    """Training met a state it must not learn from (no loss token, NaN, a loss spike)."""

    exit_code = 6


class GateRefused(LuthierError):
    """At least one gate said no; nothing was promoted."""

    exit_code = 7
    http_code = 409


class StoreError(LuthierError):
    """The home folder or its database is damaged, full, locked or newer than this code."""

    exit_code = 8
    http_code = 503


class NotFound(LuthierError, LookupError):
    """No run, release or alias goes by that name."""

    exit_code = 9
    http_code = 404


class ServeError(LuthierError):
    """The service cannot start, or cannot take this request now."""

    exit_code = 10
    http_code = 503


class FetchError(LuthierError):
    """A file from outside could not be had, or is not the file that was pinned."""

    exit_code = 11
    http_code = 502


class Interrupted(LuthierError):
    """Someone asked us to stop (SIGTERM, Ctrl-C); what was done is saved, the same command goes on."""

    exit_code = 75
    http_code = 503


def every() -> tuple[type[LuthierError], ...]:
    """All classes of the vocabulary, in the order of their exit codes (for docs and tests)."""
    return tuple(sorted(LuthierError.__subclasses__(), key=lambda kind: kind.exit_code))
