"""Refusals name no path of this machine, whatever an error's words hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from luthier.errors import ModelError, StoreError
from luthier.http import problems
from luthier.rendering import Refused
from luthier.serving.router import _read


def said(error: Exception) -> str:
    return str(problems.body(error)["error"]["message"])


@pytest.mark.parametrize("place", ["/root/.luthier/artifacts/ab/base.json", "/srv/home", "/a/b/"])
def test_a_path_in_an_errors_words_is_left_out(place: str) -> None:
    for words in (f"[Errno 2] No such file or directory: '{place}'", f"cannot read {place}: why", place):
        assert place.rstrip("/") not in said(StoreError(words, hint=f"look at {place}"))


def test_what_only_looks_like_a_path_stays() -> None:
    for words in ("send it to /v1/files/content", "see https://a.example/b/c", "text/plain and/or 3/4"):
        assert said(ModelError(words)) == words


def test_a_file_that_cannot_be_read_is_told_by_its_name_alone(tmp_path: Path) -> None:
    for made in (tmp_path / "none.json", tmp_path / "deep.json"):
        if made.name == "deep.json":
            made.write_text("[" * 200_000)
        with pytest.raises(StoreError, match=f"{made.name} cannot be read") as found:
            _read(made)
        assert os.fspath(tmp_path) not in f"{found.value.what} {found.value.hint}"


def test_what_a_chat_template_refuses_is_a_400_about_the_messages_in_the_templates_words() -> None:
    refused = Refused("roles must alternate", "prompt")
    error = problems.body(refused)["error"]
    assert problems.status(refused) == 400 and error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == ("messages", "invalid_value")
    assert error["message"].startswith("the chat template refuses this conversation: roles must alternate")
