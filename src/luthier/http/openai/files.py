"""Files: upload, list, retrieve, content, delete, in the shapes of OpenAI's Files API.

Source: https://platform.openai.com/docs/api-reference/files and the official client's types. A file of
another tenant and one that never was are the same 404. It does not know where bytes lie, nor what jobs read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any, BinaryIO, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field
from starlette.responses import StreamingResponse

from luthier import training_file
from luthier.http.auth import caller
from luthier.http.openai import multipart
from luthier.http.problems import RequestError
from luthier.incoming import Incoming, UploadRefused
from luthier.training_file import Bounds
from luthier.uploads import Label, Upload, Uploads, labelled

PIECE_BYTES = 256 * 1024
LOOK_BYTES = 64 * 1024 * 1024  # of a training file, checked before it is kept; a job checks it to its end
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["fine-tune", "fine-tune-results", "batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}
BODY = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}}
BYTES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}


class FileObject(BaseModel):
    """One file; times are whole seconds since 1970."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def routes(uploads: Uploads) -> APIRouter:
    """The routes over one home's files."""
    router = APIRouter()

    @router.post("/v1/files", openapi_extra=BODY, response_model=FileObject)
    async def create(request: Request) -> FileObject:
        """Upload a file. It streams to disk; purpose `fine-tune` wants JSON Lines, one example a line."""
        return await _create(request, uploads)

    @router.get("/v1/files", response_model=FileList)
    def listed(
        request: Request,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> FileList:
        """The caller's files, newest first unless `order` is `asc`."""
        found, more = uploads.list(
            caller(request).tenant, after=after, limit=limit, order=order, purpose=purpose
        )
        data = [shown(upload) for upload in found]
        ends = (data[0].id, data[-1].id) if data else (None, None)
        return FileList(data=data, first_id=ends[0], last_id=ends[1], has_more=more)

    @router.get("/v1/files/{file_id}", response_model=FileObject)
    def retrieve(request: Request, file_id: str) -> FileObject:
        """One of the caller's files."""
        return shown(uploads.get(caller(request).tenant, file_id))

    @router.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses=BYTES)
    def content(request: Request, file_id: str) -> StreamingResponse:
        """The bytes as they were sent."""
        upload = uploads.get(caller(request).tenant, file_id)
        headers = {
            "content-length": str(upload.bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(upload.filename, safe='')}",
            "x-content-type-options": "nosniff",
        }
        pieces = _pieces(uploads.open(upload))
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @router.delete("/v1/files/{file_id}", response_model=FileDeleted)
    def delete(request: Request, file_id: str) -> FileDeleted:
        """Remove the bytes. A file that an unfinished job reads is kept."""
        return FileDeleted(id=uploads.delete(caller(request).tenant, file_id).id)

    return router


def shown(upload: Upload) -> FileObject:
    """A file as OpenAI's clients read it."""
    return FileObject(
        id=upload.id,
        bytes=upload.bytes,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
    )


async def _create(request: Request, uploads: Uploads) -> FileObject:
    tenant = caller(request).tenant
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > uploads.limits.file_bytes + multipart.BATCH_BYTES:
        raise UploadRefused(
            f"the file is larger than {uploads.limits.file_bytes} bytes",
            param="file",
            code="file_too_large",
            http=413,
        )
    with ExitStack() as held:
        file = await run_in_threadpool(held.enter_context, uploads.incoming(tenant))
        form = await multipart.read(request, "file", file.write)
        label = Label(form.filename or "", _needed(form.fields, "purpose"), keep_seconds(form.fields))
        return shown(await run_in_threadpool(_keep, uploads, tenant, label, file))


def _keep(uploads: Uploads, tenant: str, label: Label, file: Incoming) -> Upload:
    checked(labelled(label), file)
    return uploads.keep(tenant, label, file)


def checked(label: Label, file: Incoming) -> None:
    """Refuse rows to learn from with a fault in their first `LOOK_BYTES`, by the numbers of their lines."""
    if label.purpose == "fine-tune" and file.bytes:
        found = training_file.check(file.so_far(), Bounds(bytes=LOOK_BYTES))
        if found.faults:
            raise UploadRefused("\n".join(found.faults), param="file", code="invalid_training_file")


def keep_seconds(fields: dict[str, str]) -> int | None:
    """`expires_after` of a form: as the official client writes it (`expires_after[seconds]`), or as JSON."""
    given: dict[str, Any] = {
        key.removeprefix("expires_after[").removesuffix("]"): value
        for key, value in fields.items()
        if key.startswith("expires_after[")
    }
    if not given and "expires_after" in fields:
        try:
            given = json.loads(fields["expires_after"])
        except ValueError:
            raise RequestError("`expires_after` is not JSON", param="expires_after") from None
    if not given:
        return None
    return read_expiry(given)


class ExpiresAfter(BaseModel):
    """How long a file is kept: seconds after its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=3600, le=2_592_000)]


def read_expiry(given: object) -> int:
    """The seconds of an `expires_after`, or a refusal that says what is wanted."""
    try:
        return ExpiresAfter.model_validate(given).seconds
    except ValueError:
        what = "`expires_after` is {anchor: created_at, seconds: from 3600 to 2592000}"
        raise RequestError(what, param="expires_after") from None


def _needed(fields: dict[str, str], name: str) -> str:
    if name not in fields:
        raise RequestError(f"`{name}` is missing", param=name)
    return fields[name]


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(PIECE_BYTES):
            yield piece
