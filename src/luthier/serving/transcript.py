"""What was asked and answered, in words: for an operator who asks for it, and for nobody else.

One line of JSON for each request that got an answer, or the beginning of one, in a file that only its owner
may read; a thread writes it, so that no answer waits for a disk. It holds what clients sent, without what
looks like a key. At `BYTES` a new file begins, and the last few are kept. A disk that refuses stops nothing:
lines are lost and counted, `failing` says so, and the next line is tried again.
It does not know HTTP. Answers to shadows and to graders' questions are not in it: no client read them.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import queue
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from luthier import keys
from luthier.errors import ServeError
from luthier.serving.worker import End, Heard, Pooled
from luthier.store import RequestRecord

BYTES = 64 * 1024 * 1024  # of one file
FILES = 4
ROOM_BYTES = 64 * 1024 * 1024  # of what waits for the disk

log = logging.getLogger("luthier.serving")


@dataclass(slots=True)
class Page:
    """One request under way: its id, its path, what it said and what it hears."""

    id: str
    path: str
    asked: bytes = b""
    heard: bool = False
    texts: dict[int, list[str]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)

    def hear(self, at: int, event: Heard) -> None:
        self.heard = True
        if isinstance(event, Pooled) or (isinstance(event, End) and at not in self.texts):
            return  # a vector: what was asked is told, its numbers are not
        self.texts.setdefault(at, []).append(event.text)
        if isinstance(event, End):
            self.reasons[at] = event.reason.value

    @property
    def size(self) -> int:
        return len(self.asked) + sum(len(text) for texts in self.texts.values() for text in texts)


class Transcript:
    """The file `prompts/requests.jsonl` below `folder`, and the thread that writes it.

    `served` is the key that the server was started with; it is hidden like any other. To enter raises
    `ServeError` where the file cannot be written, or is another server's.
    """

    def __init__(self, folder: Path, served: str = "") -> None:
        self.path = folder / "prompts" / "requests.jsonl"
        self.failing = False
        self.lost = 0
        self._served_sha256 = keys.fingerprint(served.encode("utf-8", "surrogateescape"))
        self._queue: queue.SimpleQueue[tuple[Page, RequestRecord] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._thread = threading.Thread(target=self._run, name="luthier-transcript", daemon=True)

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(mode=0o700, exist_ok=True)
            self._file = self._opened()
        except BlockingIOError:
            raise ServeError(
                "another server logs its prompts here", where=str(self.path),
                hint="stop it, serve from another --home, or leave --log-prompts out",
            ) from None  # fmt: skip
        except OSError as error:
            raise ServeError(
                f"prompts cannot be logged ({error.strerror})", where=str(self.path),
                hint="make it writable, or leave --log-prompts out",
            ) from error  # fmt: skip
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        os.close(self._file)

    def keep(self, page: Page, record: RequestRecord) -> None:
        """Have a request written that got something of an answer."""
        if not page.heard:
            return
        with self._lock:
            if self._waiting_bytes + page.size > ROOM_BYTES:
                self.lost += 1
                return
            self._waiting_bytes += page.size
        self._queue.put((page, record))

    # ---- below: the thread's own -----------------------------------------------------------------------

    def _run(self) -> None:
        while (given := self._queue.get()) is not None:
            page, record = given
            try:
                self._write(self._line(page, record))
                self.failing = False
            except OSError:
                self.lost += 1
                if not self.failing:  # once, not for every request that follows
                    log.exception("prompts cannot be logged")
                self.failing = True
            with self._lock:
                self._waiting_bytes -= page.size

    def _line(self, page: Page, record: RequestRecord) -> bytes:
        """Nobody keeps a request out by writing it so that we cannot (numbers of thousands of digits, or that
        are none; lists in lists without end): then it is told as it came."""
        try:
            return self._written(page, record, json.loads(page.asked))
        except (ValueError, RecursionError):
            return self._written(page, record, page.asked.decode("utf-8", "replace"))

    def _written(self, page: Page, record: RequestRecord, asked: Any) -> bytes:
        line = {
            "at": record.at, "id": page.id, "path": page.path, "tenant": record.tenant, "key": record.key_id,
            "model": record.model, "release": record.release, "status": record.status, "error": record.error,
            "prompt_tokens": record.prompt_tokens, "completion_tokens": record.completion_tokens,
            "total_s": round(record.total_s, 4), "request": asked,
            "answers": [
                {"text": "".join(texts), "finish_reason": page.reasons.get(at)}
                for at, texts in sorted(page.texts.items())
            ],
        }  # fmt: skip
        text = json.dumps(self._hidden(line), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return keys.hidden(value, self._served_sha256)
        if isinstance(value, list):
            return [self._hidden(one) for one in value]
        if isinstance(value, dict):
            return {self._hidden(name): self._hidden(one) for name, one in value.items()}
        return value

    def _write(self, line: bytes) -> None:
        """All of a line, or nothing of it."""
        size = os.fstat(self._file).st_size
        if size and size + len(line) > BYTES:
            self._turn()
            size = 0
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise

    def _turn(self) -> None:
        """Begin a new file; the oldest is forgotten."""
        names = [self.path, *(self.path.with_suffix(f".{n}.jsonl") for n in range(1, FILES))]
        if self.path.exists():  # else the last try came no further than here
            for newer, older in reversed(list(pairwise(names))):
                with suppress(FileNotFoundError):
                    os.replace(newer, older)
        full, self._file = self._file, self._opened()
        os.close(full)

    def _opened(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        file = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.fchmod(file, 0o600)
        except OSError:
            os.close(file)
            raise
        return file
