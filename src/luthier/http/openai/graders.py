"""Graders over HTTP: is this one a grader, and what does it give this answer?

Source: https://platform.openai.com/docs/api-reference/graders (`fine_tuning/alpha/graders`) and the official
client's types. `run` answers an answer that cannot be scored with a reward of 0 and the error that says why;
a grader that is none is a 400 for both. A grader that asks a model asks one that this server answers with.
Few run at once, of one tenant at most half, on threads of their own and for a bounded time.
It does not know jobs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import anyio
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier import metrics
from luthier.errors import GraderError
from luthier.http.auth import caller
from luthier.http.exchange import Exchange
from luthier.http.judging import Judges, NotAsked, Note
from luthier.http.places import Line, Places
from luthier.http.problems import RequestError
from luthier.metrics import Ask
from luthier.plugins import Part, load
from luthier.serving.service import Service

PLACE = "/v1/fine_tuning/alpha/graders"
RUNS, SHARE = 4, 2  # graders that run at once: of all tenants, and of one
WAITS = Line(length=16, wait_s=10.0)  # of one tenant's further ones
RUN_S = 60.0  # for all the judges of one run
FLAGS = (
    "formula_parse_error", "invalid_variable_error", "model_grader_parse_error", "model_grader_refusal_error",
    "model_grader_server_error", "other_error", "python_grader_runtime_error", "python_grader_server_error",
    "sample_parse_error", "truncated_observation_error", "unresponsive_reward_error",
)  # fmt: skip
DETAILS = (
    "model_grader_server_error_details", "python_grader_runtime_error_details",
    "python_grader_server_error_type",
)  # fmt: skip


class ToValidate(BaseModel):
    model_config = ConfigDict(extra="forbid")
    grader: dict[str, Any]


class ToRun(ToValidate):
    model_sample: str
    item: dict[str, Any] = Field(default={})


def routes(service: Service, elsewhere: Mapping[str, Ask], note: Note) -> APIRouter:
    """`elsewhere`: judges by name that another server is asked for."""
    router = APIRouter()
    places = Places(RUNS, SHARE, "other graders are running; try again soon", WAITS)
    threads = anyio.CapacityLimiter(RUNS)

    @router.post(f"{PLACE}/validate", openapi_extra=_body(ToValidate))
    async def validate(request: Request) -> dict[str, Any]:
        """Whether this is a grader; it comes back with its defaults filled in."""
        asked = await _read(request, service, ToValidate)
        part = await run_in_threadpool(_part, asked.grader)
        return {"grader": metrics.write(part)}

    @router.post(f"{PLACE}/run", openapi_extra=_body(ToRun))
    async def run(request: Request) -> dict[str, Any]:
        """What a grader gives one answer."""
        asked = await _read(request, service, ToRun)
        who = caller(request)
        async with places.one(who.tenant):
            judges = Judges(service, elsewhere, who, note, time.monotonic() + RUN_S)
            return await anyio.to_thread.run_sync(partial(_graded, asked, judges), limiter=threads)

    return router


def _graded(asked: ToRun, judges: Judges) -> dict[str, Any]:
    part = _part(asked.grader)
    began = time.perf_counter()
    reward, failed = 0.0, None
    scores: Mapping[str, float] = {}
    try:
        scores = _scores(part, asked, judges)
        multi = part.name == "multi"
        reward = (
            load("metrics", "multi").combined(part.params, scores) if multi else next(iter(scores.values()))
        )
    except GraderError as error:
        failed = error
    errors: dict[str, Any] = dict.fromkeys(FLAGS, False) | dict.fromkeys(DETAILS)
    if failed is not None:
        errors[failed.flag] = True
        if failed.flag == NotAsked.flag:
            errors["model_grader_server_error_details"] = failed.what
    return {
        "reward": reward,
        "sub_rewards": scores if part.name == "multi" else {},
        "model_grader_token_usage_per_model": judges.usage,
        "metadata": {
            "name": part.params.label,  # type: ignore[attr-defined]
            "type": part.name,
            "errors": errors,
            "execution_time": time.perf_counter() - began,
            "scores": scores,
            "token_usage": sum(used["total_tokens"] for used in judges.usage.values()) or None,
            "sampled_model_name": judges.model,
        },
    }


def _scores(part: Part, asked: ToRun, judges: Judges) -> Mapping[str, float]:
    """The score by the grader's name; of a multi grader, its members' scores by theirs."""
    if part.name == "multi":
        found: dict[str, float] = part.module.parts(asked.model_sample, asked.item, part.params, judges)
        return found
    label = part.params.label or part.name  # type: ignore[attr-defined]
    return {label: metrics.score(part, asked.model_sample, asked.item, judges)}


def _part(grader: Mapping[str, Any]) -> Part:
    try:
        return metrics.read(grader)
    except GraderError as error:
        what = f"{error.where}: {error.what}" if error.where else error.what
        raise RequestError(what, param="grader", code="invalid_grader", hint=error.hint) from error


async def _read(request: Request, service: Service, form: Any) -> Any:
    data = await Exchange(request, lambda record, tenant: None).body(service.limits.body_bytes)
    try:
        return form.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        raise RequestError(f"{param or 'the body'}: {first['msg']}", param=param) from error


def _body(form: type[BaseModel]) -> dict[str, Any]:
    schema = form.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
