"""What a request to fine-tune may say: OpenAI's fields, each honoured, recorded, or refused by its name.

Source: `openai.types.fine_tuning.job_create_params` and its neighbours (version 3.57). A field that is not
known here is refused: silence would be a wrong answer. It does not know files, bases or rows.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from luthier.errors import DataError

Auto = Literal["auto"]
Epochs = Annotated[int, Field(ge=1, le=50)]
Batch = Annotated[int, Field(ge=1, le=256)]
Multiplier = Annotated[float, Field(gt=0, le=100)]
Key = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[str, Field(max_length=512)]
METHODS = ("supervised", "dpo", "reinforcement")
SEEDS = 2**31


class Refused(DataError):
    """The request cannot be taken; `param` names the field and `code` says why, as OpenAI's errors do."""

    http_code = 400

    def __init__(self, what: str, *, param: str | None = None, code: str | None = None, http: int = 400):
        super().__init__(what)
        self.param, self.code, self.http_code = param, code, http


class Given(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Hyperparameters(Given):
    """Of a supervised job. "auto" is settled once the rows are counted (`spec.settled`)."""

    batch_size: Auto | Batch = "auto"
    learning_rate_multiplier: Auto | Multiplier = "auto"
    n_epochs: Auto | Epochs = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=2)] = "auto"


class ReinforcementHyperparameters(Hyperparameters):
    compute_multiplier: Auto | Annotated[float, Field(gt=0, le=10)] = "auto"
    eval_interval: Auto | Annotated[int, Field(ge=1)] = "auto"
    eval_samples: Auto | Annotated[int, Field(ge=1)] = "auto"
    reasoning_effort: Literal["default", "low", "medium", "high"] | None = None


class Supervised(Given):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Given):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Reinforcement(Given):
    grader: dict[str, Any]
    hyperparameters: ReinforcementHyperparameters = ReinforcementHyperparameters()


class Method(Given):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Reinforcement | None = None

    @model_validator(mode="after")
    def _of_one_kind(self) -> Method:
        for name in METHODS:
            if name != self.type and getattr(self, name) is not None:
                raise ValueError(f"`{name}` does not go with type {self.type!r}")
        if self.type == "reinforcement" and self.reinforcement is None:
            raise ValueError("`reinforcement` with its `grader` is required")
        return self

    @property
    def settings(self) -> Hyperparameters:
        """The hyperparameters of its kind."""
        if self.type == "dpo":
            return (self.dpo or Dpo()).hyperparameters
        if self.reinforcement is not None:
            return self.reinforcement.hyperparameters
        return (self.supervised or Supervised()).hyperparameters


class Wandb(Given):
    project: Annotated[str, Field(min_length=1, max_length=256)]
    entity: Annotated[str, Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tags: Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=50)] | None = None


class Integration(Given):
    type: Literal["wandb"]
    wandb: Wandb


class Create(Given):
    """Ask for a fine-tuning job."""

    model: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="a base model's name")
    training_file: Annotated[str, Field(min_length=1, max_length=64)]
    validation_file: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    method: Method | None = Field(default=None, description="default: supervised, with everything auto")
    hyperparameters: Hyperparameters | None = Field(default=None, description="old form; use `method`")
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=0, lt=SEEDS)] | None = None
    suffix: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] | None = None

    @model_validator(mode="after")
    def _said_once(self) -> Create:
        if self.hyperparameters is None or self.method is None:
            return self
        if self.method.type != "supervised":
            raise ValueError("top-level `hyperparameters` go with supervised jobs; put them under `method`")
        if self.hyperparameters != self.method.settings and self.method.supervised is not None:
            raise ValueError("`hyperparameters` and `method.supervised.hyperparameters` say different things")
        return self

    @property
    def how(self) -> Method:
        """The method, whichever form of the request gave it."""
        method = self.method or Method(type="supervised")
        if self.hyperparameters is not None and method.supervised is None:
            return Method(type="supervised", supervised=Supervised(hyperparameters=self.hyperparameters))
        return method

    @property
    def drawn_seed(self) -> int:
        return secrets.randbelow(SEEDS) if self.seed is None else self.seed


def parse(data: bytes) -> Create:
    """Understand a body, or raise `Refused` naming the field."""
    try:
        return Create.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None
    except RecursionError:
        raise Refused("the JSON is nested too deeply") from None


def _refusal(error: ValidationError) -> Refused:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    first = found[0]
    # A union's branches name themselves in the place; what the client wrote are the lower-case words.
    words = [str(step) for step in first["loc"] if not str(step).startswith(("literal", "constrained"))]
    words = [word for word in words if word.isidentifier() and word not in ("int", "float", "str")]
    param = ".".join(words) or None
    if first["type"] == "extra_forbidden":
        return Refused(
            f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter"
        )
    if first["type"] == "missing":
        return Refused(
            f"Missing required parameter: '{param}'", param=param, code="missing_required_parameter"
        )
    if first["type"] == "json_invalid":
        return Refused("the body is not JSON")
    said = str(first["msg"]).removeprefix("Value error, ")
    if (
        first["type"] == "literal_error" and first["loc"][-1] != "type"
    ):  # `"auto"` or a number: what both want
        others = [one for one in found[1:] if one["loc"][:-1] == first["loc"][:-1]]
        said = " or ".join([said, *(str(one["msg"]).removeprefix("Input should be ") for one in others)])
    if first["type"] == "string_pattern_mismatch":
        said = "only letters, digits, `.`, `_` and `-` may stand in it"
    return Refused(
        f"Invalid value for '{param}': {said}" if param else said, param=param, code="invalid_value"
    )
