"""llama.cpp: a release merged into one GGUF file, served by a process that we start, or are pointed at.

Source: llama.cpp's server (https://github.com/ggml-org/llama.cpp/tree/master/tools/server): `/completion`
takes token ids and tells them (`return_tokens`). The file is made by `_gguf` in the home's cache; the server
goes by its content's digest. It answers only once it has given, at every step of a few answers, the token
that the embedded engine gives in float32; in fewer bits, in a share of them that the settings name. A server
that we start listens on 127.0.0.1, asks for a key made anew each time, and ends with this process, however
that ends.

One process holds one release: llama.cpp batches no two adapters. The longest unused makes room. It does not
know tenants, so what belongs to one is read anew each time. It does not know penalties as OpenAI means them:
its own count the prompt's tokens too.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from luthier import artifacts
from luthier.backends import _gguf, _llamacpp_side, _process
from luthier.backends._http import Door, Reply, Unreachable
from luthier.backends._relay import Piece, Place, Relay, Token, Unsupported
from luthier.errors import ModelError, ServeError
from luthier.home import Home
from luthier.inference import adapters
from luthier.serving.desk import Engine
from luthier.serving.limits import Limits
from luthier.serving.router import Target
from luthier.serving.worker import Ask, EngineFailed, Reason

COMPLETION, MODELS = "/completion", "/v1/models"
PATHS = frozenset({COMPLETION, MODELS})
BEAT_S = 0.1

log = logging.getLogger("luthier.backends")


class Params(_process.Params):
    python: Path | None = Field(default=None, description="make and serve with this environment's python")
    dtype: Literal["float32", "bfloat16", "q8_0"] = "float32"
    agreement: float = Field(default=0.9, ge=0, le=1, description="of tokens, where not float32")
    places: int = Field(default=2, ge=1, le=64, description="releases in memory at once")
    context: int = Field(default=2048, ge=2, description="tokens of an answer and its prompt, kept for each")
    threads: int | None = Field(default=None, ge=1)
    gpu_layers: int = Field(default=0, ge=0)
    start_s: float = Field(default=600.0, gt=0, description="how long making and starting may take, each")


def engine(params: Params, limits: Limits, home: Home) -> Engine:
    return Relay(LlamaCpp(params, limits, home), limits, "llamacpp")


@dataclass(slots=True, eq=False)
class _Server:
    """One release's process. `lock` is held while it is made ready, `answers` are under way in it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    answers: int = 0
    door: Door | None = None
    name: str = ""
    process: subprocess.Popen[bytes] | None = None
    circuit: _process.Circuit = field(
        default_factory=lambda: _process.Circuit("llama.cpp could not serve this release")
    )

    @property
    def ready(self) -> bool:
        return self.door is not None and (self.process is None or self.process.poll() is None)

    def end(self) -> None:
        process, self.process, self.door = self.process, None, None
        if process is not None:
            _process.end(process)


class LlamaCpp:
    def __init__(self, params: Params, limits: Limits, home: Home) -> None:
        self._params, self._limits, self._home = params, limits, home
        self._changed = threading.Condition()
        self._servers: OrderedDict[tuple[str, str | None], _Server] = OrderedDict()  # longest unused first
        self._closed = False

    def servers(self, target: Target) -> list[_Server]:
        """Of a release: one, or none while it has none."""
        with self._changed:
            found = self._servers.get((target.base_digest, target.adapter_digest))
        return [] if found is None else [found]

    @contextmanager
    def held(self, target: Target) -> Iterator[Place]:
        if target.adapter_dir is not None:
            adapters.read(target.adapter_dir, ())  # what is no plain adapter makes no room for itself
        server = self._placed(target)
        try:
            with server.lock:
                if not server.ready:
                    self._make_ready(server, target)
            if server.door is None:
                raise Unreachable("llama.cpp's server is being ended")
            yield Place(server.door, server.name, COMPLETION)
        finally:
            with self._changed:
                server.answers -= 1
                self._changed.notify_all()

    def asked(self, ask: Ask) -> dict[str, Any]:
        how = ask.sampling
        if how.presence_penalty or how.frequency_penalty:
            raise Unsupported(
                "the backend llamacpp cannot count penalties over the answer alone",
                hint="the backend embedded can: luthier serve",
            )
        return {
            "prompt": list(ask.prompt_ids),
            "n_predict": how.max_new_tokens,
            "stream": True,
            "return_tokens": True,
            "cache_prompt": ask.salt is None,
            "samplers": ["temperature", "top_k", "top_p"],
            "temperature": how.temperature,
            "top_k": how.top_k,
            "top_p": how.top_p,
            "seed": secrets.randbits(31) if how.seed is None else how.seed % 2**32,
            "logit_bias": [[token, more] for token, more in how.logit_bias],
            "n_probs": 0 if how.logprobs is None else max(1, how.logprobs),
        }

    def told(self, reply: Reply, ask: Ask) -> Iterator[Piece]:
        count = 0
        for event in reply.events():
            if event.get("error"):
                raise EngineFailed(f"the engine failed: {json.dumps(event['error'])[:300]}")
            for token in _tokens(event, ask.sampling.logprobs):
                count += 1
                if token[0] in ask.stop_ids:
                    yield Piece((token,), Reason.STOP)
                    return
                yield Piece((token,))
            if event.get("stop"):
                if event.get("tokens_predicted") != count or event.get("stop_type") != "limit":
                    raise Unreachable("it ended an answer or kept tokens to itself, unasked")
                yield Piece((), Reason.LENGTH)
                return

    def forget(self) -> None:
        """What serves holds one release, and cannot have lost it."""

    def close(self) -> None:
        self._closed = True  # without a lock: a start that is under way sees it and gives up
        with self._changed:
            servers = [*self._servers.values()]
            self._servers.clear()
            self._changed.notify_all()
        for server in servers:
            with server.lock:
                server.end()

    def _placed(self, target: Target) -> _Server:
        """The release's server, in the place of the longest unused where all are taken."""
        key, out = (target.base_digest, target.adapter_digest), None
        with self._changed:
            while key not in self._servers and len(self._servers) >= self._params.places:
                idle = next((one for one, server in self._servers.items() if not server.answers), None)
                if idle is not None:
                    out = self._servers.pop(idle)
                elif self._closed or not self._changed.wait(self._params.timeout_s):
                    raise Unreachable("no place for a release became free")
            server = self._servers.setdefault(key, _Server())
            self._servers.move_to_end(key)
            server.answers += 1
        if out is not None:
            out.end()
        return server

    def _make_ready(self, server: _Server, target: Target) -> None:
        server.circuit.require_closed()
        if server.process is not None:
            log.error("llama.cpp ended unasked; it is started again")
        server.end()
        job = self.job(target)
        try:
            server.name = self._made(job)
            if self._params.url is None:
                server.process, server.door = self._start(job, server.name)
                self._until_listed(server)
            else:
                server.door = self._found(server.name)
            self._require_parity(job, server)
        except ServeError:
            server.end()
            server.circuit.open(self._params)
            raise

    def job(self, target: Target) -> _gguf.Job:
        return _gguf.Job(
            home=str(self._home.path),
            python=str(self._params.python),
            base=str(target.base_dir.resolve()),
            base_digest=target.base_digest,
            adapter=None if target.adapter_dir is None else str(target.adapter_dir.resolve()),
            adapter_digest=target.adapter_digest,
            dtype=self._params.dtype,
        )

    def _made(self, job: _gguf.Job) -> str:
        """The digest of the file's folder, once it is there and whole."""
        if not job.folder.exists():
            if self._params.python is None:
                raise ServeError(
                    f"the file {job.folder / _gguf.FILE} is not made yet",
                    hint="serve this release once with `python`, then start a server on the file",
                )
            self._make(job)
        return artifacts.verify(job.folder)

    def _make(self, job: _gguf.Job) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="luthier-gguf-"))
        asked = json.dumps(json.loads(job.text) | {"problem": str(scratch / _gguf.PROBLEM)})
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        process = _process.started(
            [sys.executable, "-P", "-m", "luthier.backends._gguf", asked],
            _process.environment(PYTHONPATH=path, HF_HUB_OFFLINE="1"),
        )
        try:
            until_s = time.monotonic() + self._params.start_s
            while process.poll() is None and time.monotonic() < until_s and not self._closed:
                time.sleep(BEAT_S)
            if not job.folder.exists():
                raise _problem(scratch / _gguf.PROBLEM)
        finally:
            _process.end(process)
            shutil.rmtree(scratch, ignore_errors=True)

    def _start(self, job: _gguf.Job, name: str) -> tuple[subprocess.Popen[bytes], Door]:
        key, port = secrets.token_urlsafe(32), _process.free_port()
        longest = artifacts.read_json(Path(job.base) / "config.json").get("max_position_embeddings")
        asked = {
            "do": "serve", "file": str(job.folder / _gguf.FILE), "name": name, "port": port,
            "slots": self._limits.active, "context": min(self._params.context, longest or 2**31),
            "dtype": job.dtype, "threads": self._params.threads, "gpu_layers": self._params.gpu_layers,
        }  # fmt: skip
        command = [job.python, "-I", str(Path(_llamacpp_side.__file__)), json.dumps(asked)]
        process = _process.started(command, _process.environment(LUTHIER_KEY=key))
        return process, Door(f"http://127.0.0.1:{port}", PATHS, key, self._params.timeout_s)

    def _until_listed(self, server: _Server) -> None:
        assert server.process is not None and server.door is not None
        until_s = time.monotonic() + self._params.start_s
        while time.monotonic() < until_s and not self._closed:
            if server.process.poll() is not None:
                raise ServeError("llama.cpp ended before it was ready", hint="stderr says why")
            try:
                if server.name in _names(server.door):
                    return
            except Unreachable:
                time.sleep(BEAT_S)
        raise ServeError(f"llama.cpp was not ready within {self._params.start_s:.0f} s")

    def _found(self, name: str) -> Door:
        """The one at `url`; its file must go by the digest, so that it cannot be another."""
        door = Door(self._params.url or "", PATHS, self._params.key, self._params.timeout_s)
        if name not in _names(door):
            raise ServeError(
                f"llama.cpp does not serve {name[:12]}", hint=f"start it on that file with --alias {name}"
            )
        return door

    def _require_parity(self, job: _gguf.Job, server: _Server) -> None:
        """Ask for the next token at every step of the probes' answers, as the embedded engine gave them."""
        assert server.door is not None
        right = count = 0
        for probe in artifacts.read_json(job.folder / _gguf.PROBES):
            for at, token in enumerate(probe["answer"]):
                right += _next(server.door, [*probe["prompt"], *probe["answer"][:at]]) == token
                count += 1
        needed = 1.0 if job.dtype == "float32" else self._params.agreement
        log.info("llama.cpp in %s gives %d of %d probed tokens", job.dtype, right, count)
        if not count or right < needed * count:
            raise ServeError(
                f"llama.cpp gives {right} of {count} tokens that the embedded engine gives; "
                f"{needed:.0%} are needed in {job.dtype}",
                hint="serve this release with the backend embedded, or with a wider dtype",
            )


def _next(door: Door, prompt: list[int]) -> int | None:
    """The likeliest token after a prompt."""
    body = {"prompt": prompt, "n_predict": 1, "temperature": 0.0, "return_tokens": True}
    with door.call(COMPLETION, body) as reply:
        if reply.status != 200:
            raise Unreachable(f"llama.cpp does not answer a probe ({reply.problem()})")
        tokens = reply.json().get("tokens")
    return tokens[0] if isinstance(tokens, list) and tokens else None


def _tokens(event: dict[str, Any], logprobs: int | None) -> Iterator[Token]:
    """What one event brings, where asked with log-probabilities."""
    ids, told = event.get("tokens") or [], event.get("completion_probabilities") or []
    for n, token in enumerate(ids):
        if logprobs is None:
            yield int(token), None, ()
            continue
        if n >= len(told) or told[n].get("id") != token:
            raise Unreachable("it tells no log-probabilities")
        tops = [(int(one["id"]), float(one["logprob"])) for one in told[n].get("top_logprobs") or []]
        yield int(token), float(told[n]["logprob"]), tuple(sorted(tops, key=lambda one: -one[1])[:logprobs])


def _problem(path: Path) -> ServeError | ModelError:
    if not path.exists():
        return ServeError("the GGUF file could not be made", hint="stderr says why")
    told = artifacts.read_json(path)
    return ServeError(told["what"], where=told["where"], hint=told["hint"])


def _names(door: Door) -> list[str]:
    with door.call(MODELS) as reply:
        if reply.status != 200:
            raise Unreachable(f"llama.cpp does not list its models ({reply.problem()})")
        listed = reply.json().get("data") or []
    return [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one]
