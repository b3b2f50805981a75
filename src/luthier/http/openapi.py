"""The OpenAPI document, as this server really answers: its own errors, its key, no status it never sends.

Source: https://spec.openapis.org/oas/v3.1.0. FastAPI writes the document from the routes; it would promise
a 422 in a shape of its own, which here is a 400 in OpenAI's. The document is served at /openapi.json to
whoever has a key: it says which routes run here, and no client of OpenAI's asks for it.
It does not know what any route does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

OPEN = {"/health"}
VERBS = {"get", "post", "put", "patch", "delete"}
WORDS = {"type": "string"}
TEXT = {"type": ["string", "null"]}
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": WORDS, "type": WORDS, "param": TEXT, "code": TEXT},
        }
    },
}  # fmt: skip
FAILED = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
FAILURES = {
    "4XX": {"description": "refused; `error.message` says why and what to do", **FAILED},
    "5XX": {"description": "the server, its disk or its engine failed", **FAILED},
}


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """What `app.openapi` is to be: the document, made once."""
    kept: dict[str, Any] = {}

    def document() -> dict[str, Any]:
        if not kept:
            made = get_openapi(title=app.title, version=metadata.version("luthier"), routes=app.routes)
            kept.update(corrected(made))
        return kept

    return document


def corrected(document: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's document with our errors and our key in it."""
    parts = document.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            if verb in VERBS:
                responses = operation.setdefault("responses", {})
                responses.pop("422", None)
                for status, failure in FAILURES.items():
                    responses.setdefault(status, failure)
                operation["security"] = [] if path in OPEN else [{"key": []}]
    return document
