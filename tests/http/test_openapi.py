"""The OpenAPI document: complete, behind the key, and kept to under requests that are made from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import positive_data_acceptance

from tests.http.running import Client, threaded
from tests.serving.make_home import World, copy_home


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    copy = copy_home(world, tmp_path_factory.mktemp("openapi") / "home")
    with threaded(copy.store, copy.home) as client:
        yield client


@pytest.fixture(scope="module")
def document(server: Client) -> dict[str, Any]:
    with server.open() as http:
        found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def test_the_document_is_served_to_whoever_has_a_key(server: Client, document: dict[str, Any]) -> None:
    with server.open() as http:
        refused = http.get("/openapi.json", headers={"authorization": "Bearer wrong"})
    assert refused.status_code == 401
    assert document["openapi"].startswith("3.1")


def test_every_operation_has_our_errors_our_key_and_words(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for verb, operation in operations.items():
            responses = operation["responses"]
            assert "4XX" in responses and "5XX" in responses and "422" not in responses, (verb, path)
            assert operation["security"] == ([] if path == "/health" else [{"key": []}])
            assert operation.get("description"), (verb, path)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def hammered(server: Client, document: dict[str, Any], cases: int) -> int:
    """Requests made from the document; each answer must be one that the document promises."""
    asked_of = json.loads(json.dumps(document))
    for operations in asked_of["paths"].values():
        for operation in operations.values():
            del operation["security"]  # all requests come with a good key; other tests come without
    schema = schemathesis.openapi.from_dict(asked_of)
    headers = {"authorization": f"Bearer {server.key}"}
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=cases, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            nonlocal asked
            response = case.call(base_url=server.url, headers=headers, timeout=30)
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            # What a schema allows may still be no training file, or no file at all: not every 400 is wrong.
            case.validate_response(response, excluded_checks=[positive_data_acceptance])
            asked += 1

        check()
    return asked


def test_generated_requests_meet_no_500_and_no_answer_outside_the_document(
    server: Client, document: dict[str, Any]
) -> None:
    assert hammered(server, document, 12) >= 100


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_thousands_of_generated_requests_meet_no_500(server: Client, document: dict[str, Any]) -> None:
    assert hammered(server, document, 120) >= 3_000
