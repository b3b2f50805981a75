"""What this machine can do: cores, memory, number formats, and a second's worth of measured rates.

Sources: /proc/cpuinfo, the memory that `engine.memory` finds, cgroup limits, and short timed
matrix products. `cores`, `memory_total` and `native_bf16` are the same every time on one machine; rates
are measured and vary with whatever else runs. It does not know GPUs yet.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from luthier.engine.memory import machine

_FLAGS = ("amx_bf16", "amx_tile", "amx_int8", "avx512_bf16", "avx512f", "avx2", "bf16", "sve")


@dataclass(frozen=True)
class Host:
    cores: int
    memory_total_bytes: int
    memory_free_bytes: int
    flags: tuple[str, ...]
    bf16_flops: float
    fp32_flops: float
    read_bytes_s: float

    @property
    def native_bf16(self) -> bool:
        return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(self.flags)

    @property
    def dtype(self) -> str:
        """The number type in which a bfloat16 base trains fastest here."""
        slow = not self.native_bf16 and self.bf16_flops < self.fp32_flops
        return "float32" if slow else "bfloat16"

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "flags": list(self.flags), "native_bf16": self.native_bf16}


def probe(seconds: float = 0.8) -> Host:
    """Look and measure, in about a second."""
    total, free = machine()
    share = seconds / 4
    return Host(
        cores=cores(), memory_total_bytes=total, memory_free_bytes=free, flags=cpu_flags(),
        bf16_flops=_gemm_rate(torch.bfloat16, share), fp32_flops=_gemm_rate(torch.float32, share),
        read_bytes_s=_read_rate(share),
    )  # fmt: skip


def cores() -> int:
    """Processors this process may use: affinity, a cgroup's share of time, and OMP_NUM_THREADS."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words("/sys/fs/cgroup/cpu.max")
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]):
        allowed = min(allowed, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return min(allowed, int(wish)) if wish.isdigit() and int(wish) else allowed


def cpu_flags() -> tuple[str, ...]:
    """The instruction sets that matter here, of the first processor."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith(("flags", "Features")):
            have = set(line.split(":", 1)[1].split())
            return tuple(flag for flag in _FLAGS if flag in have)
    return ()


def _gemm_rate(dtype: torch.dtype, seconds: float, size: int = 512) -> float:
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    torch.mm(left, right)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def _read_rate(seconds: float, size: int = 1 << 26) -> float:
    data = torch.ones(size // 4)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best is math.inf:
        began = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - began)
    return size / best


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _words(path: str) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []
