"""Every refusal in OpenAI's error shape: {"error": {"message", "type", "param", "code"}}.

Source: https://platform.openai.com/docs/guides/error-codes. A luthier error keeps its own HTTP code and
says what and what to do; where (a path of this machine) stays in the server's log, and what looks like such a
path in the words themselves is left out. An error that is a
bug says nothing about itself to the client.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import JSONResponse

from luthier.errors import GateRefused, LuthierError, NotFound, ServeError
from luthier.inference.grammar import GrammarRefused
from luthier.serving.limits import Busy
from luthier.serving.service import NoToken, TooLong

# two steps or more from the root, but not a path of the API nor the end of a URL
_PLACE = re.compile(r"(?<![\w.:/@%-])/(?!v1/)[\w.@+~-]+(?:/[\w.@+~-]+)+/?")
BELOW_V1 = {"chat", "completions", "embeddings", "files", "fine_tuning", "models", "uploads"}
KINDS = {403: "permission_error", 429: "rate_limit_error"}
CODES: tuple[tuple[type[LuthierError], str], ...] = (
    (TooLong, "context_length_exceeded"),
    (NoToken, "invalid_prompt"),
    (NotFound, "model_not_found"),
    (GateRefused, "model_refused"),
    (Busy, "rate_limit_exceeded"),
    (GrammarRefused, "invalid_schema"),
)
PARAMS = {
    "model_not_found": "model",
    "model_refused": "model",
    "context_length_exceeded": "messages",
    "invalid_schema": "response_format",
    "invalid_prompt": "prompt",
}


class RequestError(ServeError):
    """The request itself is wrong; `param` names the field."""

    http_code = 400

    def __init__(
        self, what: str, *, param: str | None = None, code: str | None = None, hint: str | None = None
    ):
        super().__init__(what, hint=hint)
        self.param = param
        self.code = code


class TooLarge(RequestError):
    """The body is larger than this server reads. The connection stays for as long as `http.patience` lets
    the client send on: closed on unread bytes, it would take the answer with it (RFC 9112 §9.6)."""

    http_code = 413


def body(error: Exception) -> dict[str, Any]:
    """The JSON body for an error."""
    if not isinstance(error, LuthierError):
        return shape("the server failed; its log has the details", "server_error", None, "internal_error")
    message = _PLACE.sub("…", f"{error.what} ({error.hint})" if error.hint else error.what)
    kind = KINDS.get(error.http_code, "invalid_request_error" if error.http_code < 500 else "server_error")
    if hasattr(error, "param"):  # the error says itself which field it is about
        return shape(message, kind, error.param, getattr(error, "code", None))
    code = next((code for family, code in CODES if isinstance(error, family)), None)
    param = PARAMS.get(code or "")
    return shape(message, kind, param, code or ("unavailable" if error.http_code == 503 else None))


def status(error: Exception) -> int:
    return error.http_code if isinstance(error, LuthierError) else 500


def response(error: Exception, headers: dict[str, str] | None = None) -> JSONResponse:
    extra = dict(headers or {})
    wait_s = getattr(error, "retry_after_s", None)
    if wait_s is not None:
        extra["retry-after"] = str(wait_s)
    return JSONResponse(body(error), status(error), headers=extra)


def refusal(
    code: int, message: str, reason: str | None, headers: dict[str, str] | None = None
) -> JSONResponse:
    """A refusal that has no exception behind it (no route, no key)."""
    kind = KINDS.get(code, "invalid_request_error" if code < 500 else "server_error")
    return JSONResponse(shape(message, kind, None, reason), code, headers=headers)


def no_path(path: str) -> str:
    """What to say of a path that leads nowhere."""
    what = f"no such path: {path[:100]}"
    if path.split("/")[1:2] and path.split("/")[1] in BELOW_V1:  # a client whose base_url is the bare url
        what += "; the client's base_url ends with /v1"
    if path.rstrip("/") == "/v1/responses":
        what += "; this server speaks /v1/chat/completions"
    return what


def shape(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
