"""A disk that goes wrong at a chosen file operation: an error, a torn write, or the end of the process."""

from __future__ import annotations

import builtins
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from luthier import artifacts

OPERATIONS = ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


class Disk:
    """Counts file operations and goes wrong at one of them, or from that one on (`lasting`)."""

    def __init__(self, at: int, wrong: Callable[[], None], lasting: bool = False) -> None:
        self.left, self.wrong, self.lasting, self.failed = at, wrong, lasting, False

    def operation(self) -> None:
        self.left -= 1
        if self.left == -1 or (self.left < 0 and self.lasting):
            self.failed = True
            self.wrong()


class HalfWritten:
    """A file whose write is half done when the disk may go wrong."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def writelines(self, chunks: Any) -> None:
        data = b"".join(chunks)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.disk.operation()
        self.file.write(data[len(data) // 2 :])

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """The operating system's calls go through `disk` meanwhile."""

    def through(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            disk.operation()
            return real(*given, **named)

        return call

    def opened(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
        file = builtins.open(path, mode, *given, **named)  # noqa: SIM115
        return HalfWritten(file, disk) if "x" in mode else file

    before = {name: getattr(os, name) for name in OPERATIONS}
    try:
        for name, real in before.items():
            setattr(os, name, through(real))
        artifacts.open = opened  # type: ignore[attr-defined]
        yield disk
    finally:
        for name, real in before.items():
            setattr(os, name, real)
        del artifacts.open  # type: ignore[attr-defined]


def error(code: int) -> Callable[[], None]:
    def wrong() -> None:
        raise OSError(code, os.strerror(code))

    return wrong


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
