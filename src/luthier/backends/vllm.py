"""vLLM: a server that we start from its own environment, or are pointed at, on this machine only.

Source: https://docs.vllm.ai/en/latest/features/lora (loading at run time) and vllm-project/vllm#42125 (a name
whose bytes change may answer from the old ones' cache). So a base and an adapter go by their content's digest
and a name never has other bytes. What vLLM would answer with 500 (an adapter of too high a rank, one that is
not plain LoRA) is refused before it is posted. A server that we start listens on 127.0.0.1, asks for a key
made anew each time, and ends with this process, however that ends. Only the paths in `PATHS` are ever asked.

It serves one base: the first that is asked for. A seeded answer differs from the embedded engine's. It does
not know tenants or aliases.
"""

from __future__ import annotations

import logging
import re
import secrets
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from luthier.backends import _process, _relay
from luthier.backends._http import Door, Reply, Unreachable
from luthier.backends._relay import COMPLETIONS, Piece, Place, Relay
from luthier.errors import ModelError, ServeError
from luthier.home import Home
from luthier.inference import adapters
from luthier.serving.desk import Engine
from luthier.serving.limits import Limits
from luthier.serving.router import Target
from luthier.serving.worker import Ask

MODELS, LOAD, UNLOAD = "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS = frozenset({COMPLETIONS, MODELS, LOAD, UNLOAD})
OURS = re.compile(r"[0-9a-f]{64}")  # what others loaded under other names is left alone
BEAT_S = 0.25
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes as the highest

log = logging.getLogger("luthier.backends")


class Params(_process.Params):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    adapters: int = Field(default=8, ge=1, le=64, description="adapters in its memory at once")
    rank: int = Field(default=64, description="the highest rank of an adapter")
    context: int | None = Field(default=None, ge=2, description="tokens in all; default: the model's")
    cache_gib: int = Field(default=1, ge=1, description="for keys and values, where it runs on a CPU")

    @field_validator("rank")
    @classmethod
    def _one_of_its_ranks(cls, rank: int) -> int:
        if rank not in RANKS:
            raise ValueError(f"vLLM takes {', '.join(map(str, RANKS))}")
        return rank


def engine(params: Params, limits: Limits, home: Home) -> Engine:
    return Relay(Vllm(params, limits), limits, "vllm")


class Vllm:
    """The server and what is loaded in it. `forget` is for one that lost what it had."""

    def __init__(self, params: Params, limits: Limits) -> None:
        self._params, self._limits = params, limits
        self._changed = threading.Condition()
        self._slots: OrderedDict[str, int] = (
            OrderedDict()
        )  # adapter → answers in it; the longest unused first
        self._door: Door | None = None
        self._base: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._circuit = _process.Circuit("vLLM could not be started")
        self._closed = False

    @property
    def door(self) -> Door | None:
        """The way to the server, while there is one."""
        return self._door

    @contextmanager
    def held(self, target: Target) -> Iterator[Place]:
        with self._changed:
            door = self._server(target)
            digest, folder = target.adapter_digest, target.adapter_dir
            if digest is not None and folder is not None:
                self._take(door, digest, folder)
        try:
            yield Place(door, digest or target.base_digest)
        finally:
            with self._changed:
                if digest is not None and digest in self._slots:
                    self._slots[digest] = max(0, self._slots[digest] - 1)
                self._changed.notify_all()

    def asked(self, ask: Ask) -> dict[str, Any]:
        """With vLLM's own: it stops at our stop tokens and at no others, and tells tokens by their ids. What
        is read under one salt is not found again under another."""
        salted = {} if not ask.salt else {"cache_salt": ask.salt}
        own = {
            "ignore_eos": True,
            "stop_token_ids": sorted(ask.stop_ids),
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        }
        return _relay.asked(ask) | salted | own

    def told(self, reply: Reply, ask: Ask) -> Iterator[Piece]:
        return _relay.told(reply, ask.sampling.logprobs)

    def forget(self) -> None:
        with self._changed:
            self._slots.clear()

    def close(self) -> None:
        self._closed = True  # without the lock: a start that is under way sees it and gives up
        with self._changed:
            self._changed.notify_all()
            self._end()

    def _take(self, door: Door, digest: str, folder: Path) -> None:
        """Have the adapter loaded, one at a time, in the place of the longest unused where all are taken."""
        while digest not in self._slots and len(self._slots) >= self._params.adapters:
            idle = next((one for one, answers in self._slots.items() if not answers), None)
            if idle is None:
                if self._closed or not self._changed.wait(self._params.timeout_s):
                    raise Unreachable("no place for an adapter became free")
                continue
            self._post(door, UNLOAD, {"lora_name": idle})
            del self._slots[idle]
        if digest not in self._slots:
            check(folder, self._params.rank)
            self._post(door, LOAD, {"lora_name": digest, "lora_path": str(folder.resolve())})
            self._slots[digest] = 0
        self._slots[digest] += 1
        self._slots.move_to_end(digest)

    def _post(self, door: Door, path: str, body: dict[str, str]) -> None:
        with door.call(path, body) as reply:
            if reply.status == 200:
                return
            problem = reply.problem()
        known = reply.status == 404 if path == UNLOAD else "already been loaded" in problem
        if not known:  # a name is its content, so one that is there already is the same
            raise ModelError(f"vLLM does not take the adapter {body['lora_name'][:12]} ({problem})")

    def _server(self, target: Target) -> Door:
        """The server, started or found, once it is known to hold the target's base."""
        if self._process is not None and self._process.poll() is not None:
            log.error("vLLM ended unasked; it is started again")
            self._end()
        if self._door is None:
            self._circuit.require_closed()
            try:
                self._door = self._found(target) if self._params.url is not None else self._started(target)
            except ServeError:
                self._end()
                self._circuit.open(self._params)
                raise
            self._base = target.base_digest
        if self._base != target.base_digest:
            raise ServeError(
                f"vLLM holds base {(self._base or '')[:12]}, this release needs {target.base_digest[:12]}",
                hint="one server of vLLM serves one base",
            )
        return self._door

    def _found(self, target: Target) -> Door:
        """The one at `url`; its base must go by the digest, so that it cannot be another."""
        door = Door(self._params.url or "", PATHS, self._params.key, self._params.timeout_s)
        names = _names(door)
        if target.base_digest not in names:
            raise ServeError(
                f"vLLM does not serve the base {target.base_digest[:12]}",
                hint=f"start it with --served-model-name {target.base_digest} --enable-lora",
            )
        ours = [name for name in names if OURS.fullmatch(name) and name != target.base_digest]
        self._slots = OrderedDict.fromkeys(ours, 0)
        return door

    def _started(self, target: Target) -> Door:
        key, port = secrets.token_urlsafe(32), _process.free_port()
        door = Door(f"http://127.0.0.1:{port}", PATHS, key, self._params.timeout_s)
        self._process = _process.started(self._command(target, port), self._environment(key))
        until_s = time.monotonic() + self._params.start_s
        while time.monotonic() < until_s and not self._closed:
            if self._process.poll() is not None:
                raise ServeError("vLLM ended before it was ready", hint="stderr says why")
            try:
                if target.base_digest in _names(door):
                    return door
            except Unreachable:
                time.sleep(BEAT_S)
        raise ServeError(f"vLLM was not ready within {self._params.start_s:.0f} s")

    def _command(self, target: Target, port: int) -> list[str]:
        params = self._params
        command = [
            str(params.python), "-m", "vllm.entrypoints.openai.api_server",
            "--host", "127.0.0.1", "--port", str(port), "--model", str(target.base_dir.resolve()),
            "--served-model-name", target.base_digest, "--dtype", params.dtype, "--generation-config", "vllm",
            "--enable-lora", "--max-lora-rank", str(params.rank), "--max-loras", str(params.adapters),
            "--max-cpu-loras", str(params.adapters), "--max-num-seqs", str(self._limits.active),
        ]  # fmt: skip
        return command if params.context is None else [*command, "--max-model-len", str(params.context)]

    def _environment(self, key: str) -> dict[str, str]:
        return _process.environment(
            VLLM_API_KEY=key,
            VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
            VLLM_CPU_KVCACHE_SPACE=str(self._params.cache_gib),
            VLLM_CPU_NUM_OF_RESERVED_CPU="0",
            VLLM_HOST_IP="127.0.0.1",
            VLLM_NO_USAGE_STATS="1",
            DO_NOT_TRACK="1",
            HF_HUB_OFFLINE="1",
        )

    def _end(self) -> None:
        process, self._process, self._door = self._process, None, None
        self._slots.clear()
        if process is not None:
            _process.end(process)


def check(folder: Path, most: int) -> None:
    """Refuse what vLLM answers with 500, or reads otherwise than PEFT does."""
    config, _ = adapters.inspect(folder)
    pairs = adapters.read(folder, ())
    rank = max(len(pair.a_R_E) for pair in pairs.values())
    if rank > most or not isinstance(config.get("r"), int) or config["r"] > most:
        raise ModelError(
            f"the adapter's rank {rank} is above {most}", where=str(folder), hint="raise the backend's `rank`"
        )
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    if patterns or any(len(pair.a_R_E) != config["r"] for pair in pairs.values()):
        raise ModelError(
            f"vLLM knows one rank and one alpha for all layers, not {' and '.join(patterns) or 'several'}",
            where=str(folder),
        )


def _names(door: Door) -> list[str]:
    with door.call(MODELS) as reply:
        if reply.status != 200:
            raise Unreachable(f"vLLM does not list its models ({reply.problem()})")
        listed = reply.json().get("data") or []
    return [str(one["id"]) for one in listed if isinstance(one, dict) and "id" in one]
