"""The engine's own process: a `Worker` that does what it is told over a socket, and ends when that does.

Started by `engine_process`, never by hand. A thread reads from the first moment, so even while the models
are being loaded the end of the server is the end of this process: a kill -9 of the server leaves no orphan.
It does not know HTTP, queues of tenants or the store.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.errors import LuthierError
from luthier.serving.limits import Limits
from luthier.serving.link import Link, Message

if TYPE_CHECKING:  # what takes seconds to import is imported once the end of the server can be seen
    from luthier.serving.worker import Event, Worker

BEAT_S = 0.1
QUIET = 10  # beats at most between two signs of life


def main(descriptor: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the server says when to stop
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    link = Link(socket.socket(fileno=descriptor))
    orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, orders), name="luthier-orders", daemon=True).start()
    first = orders.get()
    from luthier.serving.worker import Worker

    worker = Worker(Limits(**first["limits"]), first["threads"])
    worker.start()
    threading.Thread(target=_beat, args=(worker, link), name="luthier-beat", daemon=True).start()
    link.post({"ready": os.getpid()})
    _obey(worker, link, orders)
    link.close()
    os._exit(0)  # no destructor of a library may hold up the end


def _listen(link: Link, orders: queue.SimpleQueue[Message]) -> None:
    for message in link.messages():
        orders.put(message)
    os._exit(0)  # the server is gone


def _beat(worker: Worker, link: Link) -> None:
    """Tell what is in use when it changes and every second, and the death of the worker's thread."""
    from luthier.serving import wire

    last, quiet, pause = None, 0, threading.Event()
    while not pause.wait(BEAT_S):
        if not worker.alive:
            link.close()
            os._exit(1)
        counts = wire.from_counts(worker.counts())
        quiet += 1
        if counts != last or quiet >= QUIET:
            link.post({"counts": counts})
            last, quiet = counts, 0


def _obey(worker: Worker, link: Link, orders: queue.SimpleQueue[Message]) -> None:
    """Until told to close."""
    under_way: dict[int, Callable[[], None]] = {}
    gone: queue.SimpleQueue[int] = queue.SimpleQueue()  # ended since the last order

    while True:
        order = orders.get()
        while not gone.empty():
            under_way.pop(gone.get(), None)
        match order["do"]:
            case "submit":
                _submit(worker, link, order, under_way, gone)
            case "cancel":
                cancel = under_way.pop(order["id"], None)
                if cancel is not None:
                    cancel()
            case "warm":
                threading.Thread(target=_warm, args=(worker, link, order), daemon=True).start()
            case "close":
                worker.close(order["grace_s"])
                return


def _submit(
    worker: Worker,
    link: Link,
    order: Message,
    under_way: dict[int, Callable[[], None]],
    gone: queue.SimpleQueue[int],
) -> None:
    from luthier.serving import wire
    from luthier.serving.worker import Failed

    number = order["id"]
    try:
        under_way[number] = worker.submit(wire.to_ask(order["ask"]), partial(_tell, link, number, gone))
    except LuthierError as error:
        link.post({"id": number, "event": wire.from_event(Failed(error))})


def _tell(link: Link, number: int, gone: queue.SimpleQueue[int], event: Event) -> None:
    from luthier.serving import wire
    from luthier.serving.worker import End, Failed

    link.post({"id": number, "event": wire.from_event(event)})
    if isinstance(event, End | Failed):
        gone.put(number)


def _warm(worker: Worker, link: Link, order: Message) -> None:
    from luthier.serving import wire

    problem: Any = None
    try:
        worker.warm(wire.to_target(order["target"]))
    except LuthierError as error:
        problem = wire.from_error(error)
    except Exception as error:
        logging.getLogger("luthier.serving").exception("a release cannot be loaded ahead")
        problem = ["EngineFailed", f"the engine failed ({type(error).__name__})", None, None]
    link.post({"warmed": order["id"], "problem": problem})


if __name__ == "__main__":
    main(int(sys.argv[1]))
