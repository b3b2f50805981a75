"""A training of two processes to be stopped and shot at: the train stage as `luthier run` would call it."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

from luthier.errors import Interrupted, LuthierError
from luthier.pipeline import Stop
from luthier.stages import train
from tests.faults.train_victim import ASKED, inputs
from tests.stages.training import phase

LONG = {"steps": 4000, "checkpoint_every": 5, "validation": {"every": 1000, "rows": 2, "patience": 3}}
FAILED = 6


def stoppable(folder: Path) -> None:
    """Train until someone asks to stop (code 75) or a rank is lost (code 6); the error goes to a file."""
    stop = Stop(saving=True)
    signal.signal(signal.SIGTERM, lambda *_: stop.request())
    given = replace(inputs(folder), stopping=lambda: stop.requested)
    try:
        train.run((phase(**LONG),), given, folder / "out")
    except LuthierError as error:
        (folder / "error.txt").write_text(str(error))
        sys.exit(ASKED if isinstance(error, Interrupted) else FAILED)
