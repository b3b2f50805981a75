"""Uploads in parts: begin, add a part, complete, cancel, in the shapes of OpenAI's Uploads API.

Source: https://platform.openai.com/docs/api-reference/uploads; the official client's
`uploads.upload_file_chunked` speaks it. It does not know where parts lie.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from luthier.assemblies import Assemblies, Assembly, Part
from luthier.http.auth import caller
from luthier.http.openai import multipart
from luthier.http.openai.files import ExpiresAfter, FileObject, checked, shown
from luthier.uploads import Label, Upload

PART = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}
BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": PART}}}}


class Begin(BaseModel):
    """A file that will come in parts."""

    filename: Annotated[str, Field(max_length=4096)]
    purpose: str
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, Field(max_length=256)] = "application/octet-stream"
    expires_after: ExpiresAfter | None = None


class Complete(BaseModel):
    """Every part once, in the order of the file."""

    part_ids: Annotated[list[str], Field(min_length=1, max_length=2048)]
    md5: str | None = None


class UploadObject(BaseModel):
    """An upload in parts; times are whole seconds since 1970."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileObject | None = None


class PartObject(BaseModel):
    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def routes(assemblies: Assemblies) -> APIRouter:
    """The routes over one home's uploads in parts."""
    router = APIRouter()

    @router.post("/v1/uploads", response_model=UploadObject)
    def begin(request: Request, asked: Begin) -> UploadObject:
        """Promise a file of so many bytes; it must be complete within an hour."""
        keep_s = asked.expires_after.seconds if asked.expires_after else None
        label = Label(asked.filename, asked.purpose, keep_s)
        return _upload(assemblies.begin(caller(request).tenant, label, asked.bytes))

    @router.post("/v1/uploads/{upload_id}/parts", openapi_extra=BODY, response_model=PartObject)
    async def add(request: Request, upload_id: str) -> PartObject:
        """Add a part of at most 64 MiB; it streams to disk."""
        tenant = caller(request).tenant
        with ExitStack() as held:
            room = assemblies.incoming(tenant, upload_id)
            file = await run_in_threadpool(held.enter_context, room)
            await multipart.read(request, "data", file.write)
            return _part(await run_in_threadpool(assemblies.add, tenant, upload_id, file))

    @router.post("/v1/uploads/{upload_id}/complete", response_model=UploadObject)
    def complete(request: Request, upload_id: str, asked: Complete) -> UploadObject:
        """Put the parts together in the order named; the answer holds the file."""
        tenant = caller(request).tenant
        made, file = assemblies.complete(tenant, upload_id, asked.part_ids, asked.md5, checked)
        return _upload(made, file)

    @router.post("/v1/uploads/{upload_id}/cancel", response_model=UploadObject)
    def cancel(request: Request, upload_id: str) -> UploadObject:
        """Give the upload up."""
        return _upload(assemblies.cancel(caller(request).tenant, upload_id))

    return router


def _upload(made: Assembly, file: Upload | None = None) -> UploadObject:
    return UploadObject(
        id=made.id, bytes=made.bytes, created_at=made.created_at, expires_at=made.expires_at,
        filename=made.label.filename, purpose=made.label.purpose, status=made.status,
        file=shown(file) if file else None,
    )  # fmt: skip


def _part(part: Part) -> PartObject:
    return PartObject(id=part.id, created_at=part.created_at, upload_id=part.assembly)
