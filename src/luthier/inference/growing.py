"""A sequence under way and what a step brings it: the words that a decoder and its users share.

It does not know models, or how a step is made up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from luthier.errors import LuthierError, ModelError
from luthier.inference.sampling import Chooser, Chosen

Tops = tuple[tuple[tuple[int, float], ...], ...]


class AnswerFailed(ModelError):
    """This answer cannot go on; the log has the details."""

    http_code = 500


class Ended(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Room:
    """How much grows at once: `rows` sequences, `chunk` prompt tokens a step, `adapters` beside the base."""

    rows: int = 16
    chunk: int = 128
    adapters: int = 32
    cache_bytes: int = 1 << 30


ROOM = Room()


@dataclass(frozen=True, slots=True)
class Read:
    """The prompt's own tokens under the model: log p of each given those before it; None for the first."""

    logps: tuple[float | None, ...]
    tops: Tops


@dataclass(slots=True, eq=False)
class Growing:
    """One sequence under way, as `begin` returns it. Everything else about it is the decoder's."""

    ids: list[int]
    adapter: str | None
    chooser: Chooser
    stop_ids: frozenset[int]
    prompt: int
    score: bool = False
    pooled: Tensor | None = None
    salt: str | None = None  # what it reads is found again by those with the same one only
    read: int = 0
    named: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    logps: list[float | None] = field(default_factory=list)
    tops: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens that are not in the cache yet."""
        return len(self.ids) - self.read


@dataclass(frozen=True, slots=True)
class Grown:
    """What a step brought one sequence. After `ended` or `error` there is no more of it."""

    row: Growing
    chosen: Chosen | None = None
    ended: Ended | None = None
    read: Read | None = None
    error: LuthierError | None = None
