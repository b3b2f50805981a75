"""Saves aside: training hands over a copy of what changes and goes on; one thread brings it to disk.

Source: the split into a snapshot and a persist phase of CheckFreq (Mohan et al., FAST 2021). At most one
save is in flight. The copy goes into memory that is kept from save to save, because fresh memory costs
a page fault for every 4 KB of it. What goes wrong in the thread is raised in training, at the next look.

It does not know what is saved, nor how often.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from torch import Tensor

from luthier.engine import checkpoint
from luthier.engine.checkpoint import Checkpoint


@dataclass(frozen=True)
class Saved:
    """A save that is on disk: how long training stood still for it, and how long it took in all."""

    step: int
    stall_s: float
    seconds: float


class Saver:
    """Writes checkpoints into `folder`, one at a time. Leaving its `with` waits for the one in flight."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._copy: dict[str, Tensor] = {}
        self._flight: Future[Saved] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self.ended()

    def busy(self) -> bool:
        """True while a save is in flight: its copy is still being read."""
        return self._flight is not None and not self._flight.done()

    def begin(self, made: Checkpoint, live: Mapping[str, Tensor]) -> None:
        """Copy `live`, which will change, and start to save it with `made`, which will not change."""
        began = time.perf_counter()
        self.ended(wait=True)
        for name, tensor in live.items():
            kept = self._copy.get(name)
            if kept is None:
                self._copy[name] = tensor.detach().to("cpu", copy=True)
            else:
                kept.copy_(tensor.detach())
        whole = replace(made, tensors={**made.tensors, **self._copy})
        self._flight = self._thread.submit(self._save, whole, (began, time.perf_counter() - began))

    def ended(self, wait: bool = False) -> Saved | None:
        """The save that came to its end since the last look, or its error; with `wait`, at once."""
        if self._flight is None or not (wait or self._flight.done()):
            return None
        flight, self._flight = self._flight, None
        return flight.result()

    def _save(self, whole: Checkpoint, times: tuple[float, float]) -> Saved:
        checkpoint.save(self._folder, whole)
        began, stall_s = times
        return Saved(whole.step, stall_s, time.perf_counter() - began)
