"""How each server of the comparison is started: its command, its environment, the names its models go by.

luthier      `luthier serve` over a home with eight releases, as it comes
vllm-lora    vLLM's CPU build with its LoRA path on, eight adapters loaded at the start
vllm-merged  the same build over the base with one adapter folded in, compiled as it comes
llamacpp     llama.cpp's server (xllamacpp), Q8_0 weights, eight LoRA files that a request switches between
peft         plain transformers and peft behind a queue of one: a request is one `generate`

All get the same threads. A server counts as ready when it has answered a request with each of its models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PEERS = HERE.parent / "peers" / ".venvs"
ADAPTERS = tuple(f"a{number}" for number in range(1, 9))
READY_S = 400.0
KV_GIB = "1"


@dataclass(frozen=True)
class Server:
    """A server that answers. `models` maps `base`, `a1` … to what requests must call them."""

    url: str
    key: str
    models: dict[str, str]
    pid: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    command: list[str]
    models: dict[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    announces: bool = False  # it prints a line of JSON with url and key when it is ready


def named(name: str, made: Path, port: int, threads: int) -> System:
    """One of the systems above."""
    base = json.loads((made / "about.json").read_text("utf-8"))["base"]
    if name == "luthier":
        command = [sys.executable, "-m", "luthier.cli", "serve", "--home", str(made / "home"), "--port", "0"]
        models = {adapter: f"bench@{adapter}" for adapter in ADAPTERS}
        return System([*command, "--base", base, "--workers", "0", "--json"], models, announces=True)
    if name in ("vllm-lora", "vllm-merged"):
        return _vllm(name, base, made, port)
    job = json.dumps({"base": base, "made": str(made), "port": port, "threads": threads})
    script, python = {
        "llamacpp": ("llamacpp_serve.py", str(PEERS / "llamacpp" / "bin" / "python")),
        "peft": ("peft_serve.py", sys.executable),
    }[name]
    models = {"base": "base", **{adapter: adapter for adapter in ADAPTERS}}
    return System([python, str(HERE / script), job], models)


def _vllm(name: str, base: str, made: Path, port: int) -> System:
    merged = name == "vllm-merged"
    command = [
        str(PEERS / "vllm" / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
        "--max-model-len", "2048",
        "--served-model-name", "base",
        "--model", str(made / "merged") if merged else base,
    ]  # fmt: skip
    if not merged:
        command += ["--enable-lora", "--max-lora-rank", "16", "--max-loras", "8", "--lora-modules"]
        command += [f"{adapter}={made / 'adapters' / adapter}" for adapter in ADAPTERS]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": KV_GIB, "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    models = {"a1": "base"} if merged else {"base": "base", **{name: name for name in ADAPTERS}}
    return System(command, models, environment)


@contextmanager
def started(name: str, made: Path, port: int, threads: int, log: Path) -> Iterator[Server]:
    """The system, ready to answer, until the block ends."""
    system = named(name, made, port, threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", **system.environment}
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as said:
        process = subprocess.Popen(
            system.command, env=environment, stdout=subprocess.PIPE if system.announces else said,
            stderr=said, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            url, key, models = f"http://127.0.0.1:{port}", "none", system.models
            if system.announces:
                said = _announced(process)
                url, key, models = said["url"], said["key"], {**models, "base": said["model"]}
            for model in models.values():
                _until_answered(process, url, key, model)
            facts = {"ready_s": round(time.perf_counter() - began, 1)}
            yield Server(url, key, models, process.pid, facts)
        finally:
            _end(process)


def _announced(process: subprocess.Popen[str]) -> dict[str, str]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit("the server ended before it was ready")
    said: dict[str, str] = json.loads(line)
    return said


def _until_answered(process: subprocess.Popen[str], url: str, key: str, model: str) -> None:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8})
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", body.encode(),
        {"content-type": "application/json", "authorization": f"Bearer {key}"},
    )  # fmt: skip
    end = time.monotonic() + READY_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}")
        try:
            urllib.request.urlopen(request, timeout=READY_S).read()
            return
        except urllib.error.HTTPError as error:
            if error.code not in (503, 429):
                raise SystemExit(f"{model}: status {error.code}: {error.read()[:500]!r}") from error
            time.sleep(0.5)
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{model} was not ready after {READY_S:g} s")


def _end(process: subprocess.Popen[str]) -> None:
    process.send_signal(2)
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process and all it started ever held, each counted at its own peak."""
    total = 0
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith("VmHWM:"):
            total += int(line.split()[1]) * 1024
    tasks = Path(f"/proc/{pid}/task")
    for task in tasks.iterdir() if tasks.exists() else ():
        total += sum(peak_rss_bytes(int(child)) for child in _read(f"{task}/children").split())
    return total


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""
