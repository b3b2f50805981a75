"""The real client against a small hub on loopback, in its own process (it reads its settings on import)."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from luthier.errors import FetchError
from luthier.sources import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle",
    "code.py": b"boom",
}
FETCH = """
import sys
from pathlib import Path
from luthier.sources import hub
params = hub.Params(repo="own/toy", revision=sys.argv[1], files={"model": sys.argv[2]})
print(hub.fetch(params, Path("."), Path(sys.argv[3]), lambda *_: None)["model"])
"""


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if f"/api/models/own/toy/tree/{COMMIT}" in self.path:
            files = [{"type": "file", "path": file, "size": len(FILES[file]), "oid": "0"} for file in FILES]
            body = json.dumps(files).encode()
        elif f"/resolve/{COMMIT}/" in self.path and name in FILES:
            body = FILES[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def fetch(
    cache: Path, address: str, name: str = ".", *, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(cache / "hf"),
    }
    command = [sys.executable, "-c", FETCH, COMMIT, name, str(cache)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_a_model_comes_without_pickles_and_code_and_needs_no_network_again(
    address: str, tmp_path: Path
) -> None:
    done = fetch(tmp_path, address)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "config.json",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    again = fetch(tmp_path, "http://127.0.0.1:9", offline=True)
    assert again.returncode == 0 and again.stdout == done.stdout


def test_a_missing_file_and_a_missing_network_are_fetch_errors(address: str, tmp_path: Path) -> None:
    missing = fetch(tmp_path, address, "no.gguf")
    assert "FetchError: own/toy@01234567 no.gguf" in missing.stderr
    nowhere = fetch(tmp_path, "http://127.0.0.1:9", offline=True)
    assert "FetchError: own/toy@01234567 ." in nowhere.stderr and "check the network" in nowhere.stderr


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12]])
def test_only_a_whole_commit_pins_a_revision(revision: str) -> None:
    with pytest.raises(ValidationError):
        hub.Params(repo="own/toy", revision=revision)


def test_offline_is_a_fetch_error_here_too(tmp_path: Path) -> None:
    with pytest.raises(FetchError):
        hub.fetch(hub.Params(repo="own/toy", revision=COMMIT), tmp_path, tmp_path, lambda *_: None)


def test_the_fingerprint_changes_with_the_commit(tmp_path: Path) -> None:
    other = COMMIT[::-1]
    prints = {hub.fingerprint(hub.Params(repo="a/b", revision=r), tmp_path)["model"] for r in (COMMIT, other)}
    assert len(prints) == 2
