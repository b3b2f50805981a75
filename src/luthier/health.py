"""What `luthier doctor` looks at: machine, libraries, home, and every sealed folder an alias stands on.

A finding is {"check", "ok", "found", "hint"}; `ok` is False only where a run or a server would fail.
It does not mend anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from luthier import artifacts
from luthier.errors import LuthierError
from luthier.home import Home
from luthier.store import Store

GIB = 1 << 30


def checks(home: Home) -> Iterator[dict[str, Any]]:
    """Every finding, cheapest first."""
    yield from _machine(home)
    for package in ("torch", "transformers", "peft", "safetensors", "fastapi", "scikit-learn"):
        yield _package(package)
    try:
        store = Store.open(home.database)
    except LuthierError as error:
        yield _finding("database", False, error.what, error.hint)
        return
    yield _finding(
        "database", True, f"{len(store.runs(limit=1000))} runs, models: {', '.join(store.names()) or 'none'}"
    )
    yield from _aliases(home, store)


def _machine(home: Home) -> Iterator[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0))
    yield _finding("cores", cores >= 1, f"{cores}")
    memory = _available_bytes() / GIB
    yield _finding("memory", memory >= 4, f"{memory:.1f} GiB free", "a small model needs about 4 GiB")
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        flags = set(next((line for line in file if line.startswith("flags")), "").split())
    fast = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    yield _finding(
        "vector units", bool(fast), ", ".join(fast) or "none", "training will be slow without AVX2"
    )
    disk = shutil.disk_usage(home.path).free / GIB
    yield _finding(
        "disk",
        disk >= 2,
        f"{disk:.1f} GiB free at {home.path}",
        "a run of the guard example needs about 2 GiB",
    )
    yield _finding(
        "home", os.access(home.path, os.W_OK), str(home.path), "choose another with --home or LUTHIER_HOME"
    )


def _available_bytes() -> int:
    with open("/proc/meminfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _package(name: str) -> dict[str, Any]:
    try:
        return _finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return _finding(name, False, "not installed", "pip install torch==2.13.0, then pip install luthier")


def _aliases(home: Home, store: Store) -> Iterator[dict[str, Any]]:
    for name in store.names():
        for alias, digest in sorted(store.aliases(name).items()):
            facts = store.release(name, digest).facts
            try:
                for folder in (digest, facts["model"]):
                    artifacts.verify(home.artifact(folder), deep=True)
            except LuthierError as error:
                yield _finding(
                    f"{name}@{alias}", False, str(error), f"luthier rollback {name} --alias {alias}"
                )
            else:
                yield _finding(f"{name}@{alias}", True, f"{digest[:12]}: every byte as sealed")


def _finding(check: str, ok: bool, found: str, hint: str | None = None) -> dict[str, Any]:
    return {"check": check, "ok": ok, "found": found, "hint": None if ok else hint}
