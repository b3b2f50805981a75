"""A process that runs another and ends it when its own stdin does: nothing started here outlives the server.

Source: the kernel closes a dead process's pipes, however it died. Run as a script, with nothing of luthier.
At the end the other gets SIGINT, time to clear up, and then its whole process group is killed.
It does not know what it runs.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress

GRACE_S = 10.0


def main(command: list[str]) -> int:
    other = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=2)
    while other.poll() is None:
        ready, _, _ = select.select([0], [], [], 0.5)
        if ready and not os.read(0, 1):
            break
    if other.poll() is None:
        other.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            other.wait(GRACE_S)
    if os.getpgrp() == os.getpid():  # what it started is in our group, and nobody else is
        os.killpg(0, signal.SIGKILL)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
