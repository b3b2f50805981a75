"""How much memory this process and this machine have, as the kernel says.

Sources: `VmRSS` and `VmHWM` of /proc/self/status and `clear_refs` (proc(5)); /proc/meminfo and the limits of
cgroup v1 and v2 (kernel documentation). What training will take is `forecast.footprint`'s work, where tensors
lie `heap`'s. It does not know GPUs.
"""

from __future__ import annotations

import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


def forget_peak() -> bool:
    """Start a new peak here (Linux, own process); false where the kernel does not allow it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_rss_bytes() -> int:
    """The most resident memory since `forget_peak`, or since the process began."""
    return status().get("VmHWM", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def rss_bytes() -> int:
    return status().get("VmRSS", 0)


def status() -> Mapping[str, int]:
    """The `Vm…` lines of this process, in bytes."""
    found: dict[str, int] = {}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name.startswith("Vm"):
                found[name] = int(rest.split()[0]) * 1024
    return found


def machine() -> tuple[int, int]:
    """(total, free) bytes: the machine's, or the container's where that is less."""
    table = {line.split(":")[0]: line.split()[1] for line in _lines("/proc/meminfo") if len(line.split()) > 1}
    total = int(table.get("MemTotal", 0)) * 1024
    free = int(table.get("MemAvailable", 0)) * 1024
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _words(limit_file), _words(used_file)
        if limit and limit[0].isdigit() and used and int(limit[0]) < total:
            total = int(limit[0])
            free = min(free, max(0, total - int(used[0])))
    return total, free


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _words(path: str) -> list[str]:
    lines = _lines(path)
    return lines[0].split() if lines else []
