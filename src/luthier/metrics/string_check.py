"""String check: 1 if two texts stand in the named relation, else 0.

Source: OpenAI's string-check grader: `eq` and `ne` compare whole texts, `like` asks whether the input
contains the reference, `ilike` the same whatever the case (full case folding, Unicode 3.13). Nothing is
trimmed or normalised first. It does not know what either text means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from luthier import plugins
from luthier.metrics import Ask, _paths
from luthier.metrics._template import Template

VERSION = 1


class Params(plugins.Params):
    label: str = ""
    input: Template = "{{ sample.output_text }}"
    reference: Template
    operation: Literal["eq", "ne", "like", "ilike"] = "eq"


def templates(params: Params) -> tuple[str, ...]:
    return params.input, params.reference


def score(answer: str, item: Mapping[str, Any], params: Params, ask: Ask) -> float:
    del ask
    said, wanted = (_paths.fill(text, answer, item) for text in (params.input, params.reference))
    holds = {
        "eq": lambda: said == wanted,
        "ne": lambda: said != wanted,
        "like": lambda: wanted in said,
        "ilike": lambda: wanted.casefold() in said.casefold(),
    }
    return float(holds[params.operation]())
