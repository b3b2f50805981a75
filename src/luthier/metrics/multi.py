"""Multi: several scores for one answer, made one by a formula (`_formula`).

Source: OpenAI's multi grader: `graders` are named, `calculate_output` names them. Every grader is asked, also
one whose score the formula does not use; there is no multi inside a multi. It does not know what its members
measure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, model_validator

from luthier import plugins
from luthier.errors import GraderError
from luthier.metrics import Ask, _formula

VERSION = 1
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w{0,63}$")]


class Params(plugins.Params):
    label: str = ""
    graders: dict[Name, plugins.choice("metrics")] = Field(min_length=1, max_length=32)  # type: ignore[valid-type]
    calculate_output: str = Field(max_length=_formula.LONGEST)

    @model_validator(mode="after")
    def _the_formula_reads_its_graders(self) -> Params:
        if any(grader.name == "multi" for grader in self.graders.values()):
            raise ValueError("a multi grader cannot hold another multi grader")
        taken = sorted(set(self.graders) & set(_formula.FUNCTIONS))
        if taken:
            raise ValueError(f"{taken[0]!r} is a function; give that grader another name")
        try:
            read = _formula.names(_formula.parse(self.calculate_output))
        except GraderError as error:
            raise ValueError(f"`calculate_output`: {error.what}") from error
        strange = sorted(read - set(self.graders))
        if strange:
            raise ValueError(f"`calculate_output`: {plugins.unknown('grader', strange[0], self.graders)}")
        return self


def templates(params: Params) -> tuple[str, ...]:
    return tuple(
        text for grader in params.graders.values() for text in grader.module.templates(grader.params)
    )


def parts(answer: str, item: Mapping[str, Any], params: Params, ask: Ask) -> dict[str, float]:
    """Each member's own score."""
    return {
        name: float(grader.module.score(answer, item, grader.params, ask))
        for name, grader in params.graders.items()
    }


def score(answer: str, item: Mapping[str, Any], params: Params, ask: Ask) -> float:
    return combined(params, parts(answer, item, params, ask))


def combined(params: Params, scores: Mapping[str, float]) -> float:
    """The formula's value for its members' scores."""
    return _formula.value(_formula.parse(params.calculate_output), scores)
