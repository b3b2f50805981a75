"""Models: list, retrieve, delete, in the shapes of OpenAI's Models API.

Source: https://platform.openai.com/docs/api-reference/models. A model of another tenant and one that never
was are the same 404. Only a tuned model's name can be given up here: a base is the server's own, and an alias
moves with `luthier promote` and `rollback`. It does not know how a name is resolved.
"""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel

from luthier.errors import NotFound
from luthier.http.auth import caller
from luthier.http.problems import RequestError
from luthier.serving.router import Listed, Router


class ModelObject(BaseModel):
    """A name to ask for. `release` is the digest of what answers to it now (not in OpenAI's shape)."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    release: str


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class ModelDeleted(BaseModel):
    id: str
    object: Literal["model"] = "model"
    deleted: Literal[True] = True


class Forbidden(RequestError):
    """The caller may use this model, and may not take it away."""

    http_code = 403


def routes(router: Router) -> APIRouter:
    """The routes over one home's names."""
    api = APIRouter()

    @api.get("/v1/models", response_model=ModelList)
    def listed(request: Request) -> ModelList:
        """Bases, the caller's tuned models, every NAME@ALIAS, and every accepted release as NAME@DIGEST."""
        return ModelList(data=[_model(entry) for entry in router.listed(caller(request).tenant)])

    @api.get("/v1/models/{model}", response_model=ModelObject)
    def retrieve(request: Request, model: str) -> ModelObject:
        """One name that the caller may ask for."""
        return _model(router.entry(model, caller(request).tenant))

    @api.delete("/v1/models/{model}", response_model=ModelDeleted)
    def delete(request: Request, model: str) -> ModelDeleted:
        """Withdraw a tuned model's name, and those of its checkpoints, for good. Its artefacts stay."""
        tenant = caller(request).tenant
        try:
            router.withdraw(model, tenant)
        except NotFound:
            router.entry(model, tenant)  # a name that is there, but not a tuned model's; else not found
            what = "only a tuned model (ft:…) can be deleted here"
            raise Forbidden(what, param="model", code="model_not_deletable") from None
        return ModelDeleted(id=model)

    return api


def _model(entry: Listed) -> ModelObject:
    return ModelObject(id=entry.model, created=entry.created_at, owned_by=entry.owner, release=entry.digest)
