"""The request log's writer: one thread puts records into the store, so that no answer waits for a disk.

A record holds counts, times, the release and whose key it was, never text; its tokens go to the key's budget.
If the disk is slower than the requests for so long that the queue fills, or refuses a record, the record is
dropped and counted: answers come first.
It does not know what is done with the log, nor HTTP.
"""

from __future__ import annotations

import logging
import queue
import threading

from luthier import budgets, keys
from luthier.store import RequestRecord, Store

ROOM = 10_000

log = logging.getLogger("luthier.serving")


class Journal:
    def __init__(self, store: Store) -> None:
        self._store = store
        self._queue: queue.Queue[RequestRecord | None] = queue.Queue(ROOM)
        self._thread = threading.Thread(target=self._run, name="luthier-journal", daemon=True)
        self.dropped = 0

    def start(self) -> None:
        self._thread.start()

    def note(self, record: RequestRecord) -> None:
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, then end the thread."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._store.log_request(record)
                if record.key_id not in (None, keys.SERVED):
                    spent = record.prompt_tokens + record.completion_tokens
                    budgets.spend(self._store, str(record.key_id), spent)
            except Exception:
                self.dropped += 1
                log.exception("a request could not be logged")
