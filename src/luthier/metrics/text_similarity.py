"""Text similarity: how far an answer overlaps with a reference, from 0 to 1, by a named measure.

Source: OpenAI's text-similarity grader; the measures, their papers and their limits stand in `_overlap`.
OpenAI's `cosine` compares embeddings of a hosted model; here it compares word counts, as nothing leaves this
machine. It does not know meaning: a right answer in other words scores low.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from luthier import plugins
from luthier.metrics import Ask, _overlap, _paths
from luthier.metrics._template import Template

VERSION = 1


class Params(plugins.Params):
    label: str = ""
    input: Template = "{{ sample.output_text }}"
    reference: Template
    evaluation_metric: Literal[
        "fuzzy_match", "bleu", "gleu", "meteor", "cosine",
        "rouge_1", "rouge_2", "rouge_3", "rouge_4", "rouge_5", "rouge_l",
    ] = "fuzzy_match"  # fmt: skip
    pass_threshold: float | None = Field(default=None, description="at or above it an answer has passed")


def templates(params: Params) -> tuple[str, ...]:
    return params.input, params.reference


def score(answer: str, item: Mapping[str, Any], params: Params, ask: Ask) -> float:
    del ask
    said, wanted = (_paths.fill(text, answer, item) for text in (params.input, params.reference))
    return _overlap.MEASURES[params.evaluation_metric](said, wanted)
