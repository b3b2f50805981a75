"""The one typed source of configuration: what a recipe may say, and its defaults.

A recipe names parts (`{name: lora, r: 16}`) and never code. It is frozen, unknown keys are refused,
defaults are validated. Reading YAML and pointing at the wrong line is `recipe_file`'s work; this module
knows neither files nor the command line.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from luthier.devices import DEVICES
from luthier.plugins import Part, choice, unknown
from luthier.schema.core import ALIAS

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ChatForm(Section):
    """How a flat record becomes a conversation: `{column}` is replaced by the record's value."""

    system: str | None = None
    user: Text = "{prompt}"
    assistant: Text = "{completion}"
    rejected: Text | None = Field(default=None, description="for pairs: the answer that was not preferred")


class Source(Section):
    """Where rows come from, and the right to use them."""

    origin: choice("sources") = Field(alias="from")  # type: ignore[valid-type]
    licence: Text = Field(description="SPDX identifier of the rows, e.g. MIT, Apache-2.0, CC-BY-4.0")
    purpose: Text = Field(description="what these rows may be and are used for here")
    chat: ChatForm | None = Field(default=None, description="omit it when records already have `messages`")
    values: dict[str, dict[str, str]] = Field(
        default={}, description="column → {value in file: value to use}"
    )


class Split(Section):
    """Shares held out of rows whose source does not declare a split of its own."""

    validation: Share = 0.1
    test: Share = 0.1
    by: Literal["random", "stratified"] = "stratified"


class Data(Section):
    sources: tuple[Source, ...] = Field(min_length=1)
    split: Split = Split()
    dedup: Literal["exact", "none"] = "exact"
    rows: Literal["Chat", "Pair", "Prompt"] | None = Field(
        default=None, description="what a row is; default: what the objective reads"
    )


class Model(Section):
    origin: choice("sources") = Field(alias="from")  # type: ignore[valid-type]
    licence: Text
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class Plan(Section):
    max_length: int = Field(default=1024, ge=8, le=131072, description="tokens; a longer row stops the run")
    memory_gb: float | None = Field(default=None, gt=0, description="budget; default: 85 % of what is free")
    minutes: float | None = Field(default=None, gt=0, description="refuse a run predicted to train longer")
    threads: int | None = Field(default=None, ge=1, description="of all processes; default: all cores")
    processes: int = Field(default=1, ge=1, le=1024, description="that train together, one for each card")
    placement: Literal["auto", "one", "ddp", "fsdp"] = Field(
        default="auto", description="whether each process has a copy of the model (ddp) or a share (fsdp)"
    )
    checkpointing: Literal["none", "selective", "full"] | None = Field(
        default=None, description="what is computed again, not kept; default: the least that fits"
    )
    device: str | None = Field(default=None, description="plan for this one, e.g. h100-sxm; default: here")
    price_per_hour: float | None = Field(default=None, ge=0, description="of the machine, in any currency")
    watts: float | None = Field(
        default=None, gt=0, description="that the machine draws; default: the device's"
    )
    price_per_kwh: float | None = Field(default=None, ge=0)

    @field_validator("device")
    @classmethod
    def _device_is_known(cls, name: str | None) -> str | None:
        if name is not None and name not in DEVICES:
            raise ValueError(unknown("device", name, tuple(DEVICES)))
        return name

    @model_validator(mode="after")
    def _placed(self) -> Plan:
        if self.placement != "auto" and (self.placement == "one") != (self.processes == 1):
            raise ValueError(f"`placement: {self.placement}` does not go with `processes: {self.processes}`")
        return self


class Validation(Section):
    every: int = Field(default=25, ge=1, description="optimiser steps between looks at held-out loss")
    rows: int = Field(default=256, ge=1)
    patience: int = Field(default=3, ge=1, description="looks without improvement before stopping early")


class Keep(Section):
    """Adapters to keep on the way, beside the one with the best held-out loss."""

    at: Literal["epochs"] | tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default="epochs", description="the end of each epoch, or these steps; held-out loss is looked at too"
    )
    last: int = Field(default=3, ge=1, description="only the last so many of them")


class Phase(Section):
    """One pass of training: what is minimised, which weights move, and how."""

    objective: choice("objectives") = Field(default={"name": "sft"})  # type: ignore[valid-type]
    method: choice("methods") = Field(default={"name": "lora"})  # type: ignore[valid-type]
    steps: int | None = Field(default=None, ge=1, description="optimiser steps; or give `epochs`")
    epochs: float | None = Field(default=None, gt=0)
    batch: int = Field(default=16, ge=1, description="rows per optimiser step")
    lr: float = Field(default=2e-4, gt=0, le=1)
    warmup: Share = Field(default=0.05, description="share of the steps, linear from 0")
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="largest global gradient norm")
    on_sick: Literal["stop", "skip"] = Field(
        default="stop", description="when a step has no loss token, a NaN, an infinity or a spike"
    )
    spike: float | None = Field(
        default=None, gt=1, description="a loss above this many times the median of the last 32 is sick"
    )
    validation: Validation = Validation()
    checkpoint_every: int = Field(default=10, ge=1, description="optimiser steps between checkpoints")
    keep: Keep | None = Field(default=None, description="adapters of the way, `checkpoints/step-N/adapter`")

    @model_validator(mode="after")
    def _one_length(self) -> Phase:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of `steps` and `epochs`")
        wanted = self.keep.at if self.keep and self.keep.at != "epochs" else ()
        if self.steps is not None and max(wanted, default=0) > self.steps:
            raise ValueError(f"`keep.at` names step {max(wanted)}; there are {self.steps}")
        return self


class Planning(Section):
    """What the plan stage acts on: a budget, and the training that must fit it."""

    budget: Plan
    phases: tuple[Phase, ...]


class Evaluate(Section):
    split: Literal["test", "validation", "train"] = Field(
        default="test",
        description="whose rows are asked; `train` shows what was learnt, not what it is worth",
    )
    labels: tuple[Text, ...] = Field(default=(), description="closed set of answers; empty: exact match")
    positive: str | None = Field(default=None, description="the label that F1 is about")
    rows: int | None = Field(default=None, ge=1, description="only this many rows (for smoke runs)")
    max_new_tokens: int = Field(default=8, ge=1, le=4096)
    baselines: tuple[choice("baselines"), ...] = ()  # type: ignore[valid-type]
    latency_requests: int = Field(
        default=50, ge=1, description="single requests timed for the release's baseline"
    )

    @model_validator(mode="after")
    def _positive_is_a_label(self) -> Evaluate:
        if self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"`positive` is {self.positive!r}, which is not in `labels` {list(self.labels)}")
        return self


class Release(Section):
    gates: tuple[choice("gates"), ...] = Field(min_length=1)  # type: ignore[valid-type]
    alias: Text = Field(default="staging", pattern=ALIAS, description="moves when all gates pass")
    champion: Text = Field(default="production", pattern=ALIAS)
    intended_use: Text
    limits: Text = Field(description="what the model must not be trusted with; printed on its card")
    weights: Literal["trained", "int8"] = Field(
        default="trained", description="what answers: the base as it was trained on, or rounded to 8 bits"
    )

    @model_validator(mode="after")
    def _rounded_weights_are_proven(self) -> Release:
        if self.weights != "trained" and "parity" not in {gate.name for gate in self.gates}:
            raise ValueError(f"`weights: {self.weights}` asks for the gate `parity`: add it to `gates`")
        return self


class Monitor(Section):
    latency_ratio: float = Field(default=2.0, gt=1, description="p95 against the release's own baseline")
    error_rate: float = Field(default=0.01, ge=0, le=1)
    minimum_requests: int = Field(default=20, ge=1, description="fewer than this: no verdict")


class Recipe(Section):
    luthier: Literal[1] = Field(description="version of the recipe language")
    name: str = Field(
        pattern=r"^[a-z][a-z0-9-]{0,47}$", description="the model's name: NAME@ALIAS when served"
    )
    seed: int = Field(default=17, ge=0, lt=2**32)
    data: Data
    model: Model
    plan: Plan = Plan()
    train: tuple[Phase, ...] = Field(min_length=1, max_length=1)
    evaluate: Evaluate = Evaluate()
    release: Release
    monitor: Monitor = Monitor()

    @model_validator(mode="after")
    def _rows_are_what_the_objective_reads(self) -> Recipe:
        wanted = self.train[0].objective.module.ROWS
        if self.data.rows not in (None, wanted):
            raise ValueError(
                f"`data.rows` is {self.data.rows!r}; {self.train[0].objective.name} reads {wanted!r}"
            )
        return self

    def section(self, stage: str) -> Any:
        """The part of the recipe that one stage acts on."""
        if stage == "data":
            return self.data.model_copy(update={"rows": self.train[0].objective.module.ROWS})
        return Planning(budget=self.plan, phases=self.train) if stage == "plan" else getattr(self, stage)

    def asked(self, stage: str) -> dict[str, Any]:
        """That part as plain JSON values: what the stage's key is made of."""
        section = self.section(stage)
        if isinstance(section, tuple):
            return {"phases": [phase.model_dump(mode="json", by_alias=True) for phase in section]}
        return dict(section.model_dump(mode="json", by_alias=True))

    def parts(self, stage: str) -> tuple[Part, ...]:
        """Every part that the stage's section names, in the order of the recipe."""
        found: list[Part] = []
        _collect(self.section(stage), found)
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe: every default filled in, as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


def _collect(value: object, found: list[Part]) -> None:
    if isinstance(value, Part):
        found.append(value)
        _collect(value.params, found)
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            _collect(getattr(value, name), found)
    elif isinstance(value, tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            _collect(item, found)
