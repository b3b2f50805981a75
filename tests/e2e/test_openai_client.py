"""The example with the official client really runs: against a `luthier serve` of its own, on a tiny base."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from luthier import plugins
from tests.e2e.world import LUTHIER, environment
from tests.tiny import make_tiny_base

EXAMPLE = Path(__file__).parents[2] / "examples" / "openai_client.py"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What `luthier serve --base … --port 0 --json` prints: one line, and then it answers."""
    folder = tmp_path_factory.mktemp("served")
    base = make_tiny_base(folder / "tiny")
    words = ["serve", "--base", str(base), "--port", "0", "--json"]
    with open(folder / "stderr", "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [*LUTHIER, *words],
            env=environment(folder / "home") | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=errors, text=True,
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError((folder / "stderr").read_text("utf-8")[-3000:])
    yield json.loads(line)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stdout.read() == ""


def test_serve_says_in_one_line_where_with_what_key_and_which_base(ready: dict[str, str]) -> None:
    assert set(ready) == {"url", "key", "model"} and ready["model"] == "tiny"
    with openai.OpenAI(base_url=ready["url"] + "/v1", api_key=ready["key"]) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.timeout(600)
def test_the_official_client_tunes_follows_chats_cancels_and_deletes(ready: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--epochs", "2", "--minutes", "4"],
        env={
            **os.environ, "OPENAI_BASE_URL": ready["url"] + "/v1", "OPENAI_API_KEY": ready["key"],
        },
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["base"] == "tiny" and told["cancelled"] == "cancelled" and told["gone"]
    assert told["refused"].startswith("line 1: ") and "\nline 2: not JSON" in told["refused"]
    trained = ["supervised", "dpo"] if "dpo" in plugins.names("objectives") else ["supervised"]
    assert list(told["models"]) == trained
    for method, model in told["models"].items():
        kind, base, _, suffix, _ = model["name"].split(":")
        assert (kind, base, suffix) == ("ft", "tiny", method)
        assert model["trained_tokens"] > 0 and model["curve_lines"] > 2 and model["answer"]
    with openai.OpenAI(base_url=ready["url"] + "/v1", api_key=ready["key"]) as client:
        assert list(client.files.list(purpose="fine-tune")) == []
        assert [model.id for model in client.models.list()] == ["tiny"]
