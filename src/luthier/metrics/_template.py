"""The type of a grader's text that may name places: bounded, and proved to hold nothing but paths.

It does not know rows: whether a place exists is `metrics.check`'s to say.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from luthier.errors import GraderError
from luthier.metrics import _paths


def _sound(text: str) -> str:
    try:
        _paths.places(text)
    except GraderError as error:
        raise ValueError(f"{error.what}{f'; {error.hint}' if error.hint else ''}") from error
    return text


Template = Annotated[str, Field(max_length=32_768), AfterValidator(_sound)]
