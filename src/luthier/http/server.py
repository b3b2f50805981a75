"""Starting and stopping: claim the port, load what is in production, answer, leave in good order.

uvicorn (https://www.uvicorn.org) speaks HTTP/1.1. Who does not read, or sends too slowly, is cut off
(`http.patience`). On SIGTERM or Ctrl-C no new request is taken, those under way may finish within the grace
time, what is then left gets a well-formed error, and the request log is written out. TLS is uvicorn's;
without it only this machine is listened to.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import math
import resource
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from luthier import backends, keys
from luthier.errors import ServeError
from luthier.home import Home
from luthier.http import PLAIN, Secure
from luthier.http.app import create_app
from luthier.http.patience import CONNECTIONS, Patient
from luthier.jobs.work import hired
from luthier.plugins import Part
from luthier.serving.limits import DEFAULTS, Limits
from luthier.serving.service import Service
from luthier.serving.transcript import Transcript
from luthier.store import Store
from luthier.uploads import Uploads

BEAT_S = 0.05
HEADER_BYTES = 32 * 1024


@dataclass(frozen=True)
class Door:
    """Where to listen and how much to take on. Without a `key` a new one is made; set `stop` to end it.
    `apart`: the engine is a process of its own. `workers`: processes that carry out fine-tuning jobs.
    `backend`: what computes the answers, if not our own engine. `judge`: whom graders may ask elsewhere.
    `log_prompts`: what is asked and answered is written down (`serving.transcript`)."""

    host: str = "127.0.0.1"
    port: int = 8321
    key: str | None = None
    limits: Limits = DEFAULTS
    threads: int | None = None
    apart: bool = False
    workers: int = 0
    backend: Part | None = None
    judge: Part | None = None
    log_prompts: bool = False
    secure: Secure = PLAIN
    stop: threading.Event = field(default_factory=threading.Event)


def serve(store: Store, home: Home, door: Door, announce: Callable[[dict[str, Any]], None]) -> None:
    """Serve until a signal or `door.stop`; `announce({"url", "key", "models"})` once ready to
    answer, with `prompt_log` where prompts are written to if they are."""
    if door.key is not None and len(door.key) < 8:
        raise ServeError("this key is too short to keep anyone out", hint="without one, a good one is made")
    _require_tls(door)
    _allow_files(2 * CONNECTIONS)
    key = door.key or keys.new_secret()
    judges = {} if door.judge is None else backends.judges(door.judge)
    service = Service(store, home, door.limits, door.threads, door.apart, door.backend)
    written = Transcript(home.path, key) if door.log_prompts else nullcontext(None)
    with (
        _claimed(door.host, door.port) as claimed,
        _signals(door.stop),
        written as transcript,
        service,
        hired(home, door.workers),
    ):
        service.warm()
        uploads = Uploads(store, home)
        uploads.sweep()
        config = uvicorn.Config(
            create_app(service, key, uploads, judges, transcript),
            http=Patient,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            ssl_certfile=door.secure.cert,
            ssl_keyfile=door.secure.key,
            timeout_graceful_shutdown=math.ceil(door.limits.grace_s) + 5,
        )
        listed = service.router.listed()
        models = [entry.model for entry in listed if not entry.model.endswith(entry.digest)]
        ready = {"url": _url(claimed, door.secure.cert is not None), "key": key, "models": models}
        if transcript is not None:
            ready["prompt_log"] = str(transcript.path)
        asyncio.run(_live(uvicorn.Server(config), claimed, service, door, lambda: announce(ready)))


async def _live(
    server: uvicorn.Server, claimed: socket.socket, service: Service, door: Door, ready: Callable[[], None]
) -> None:
    """uvicorn's life: told when it is ready, stopped when asked, the worker drained meanwhile."""
    serving = asyncio.create_task(server.serve([claimed]))
    draining: asyncio.Future[None] | None = None
    try:
        while not (server.started or serving.done()):
            await asyncio.wait({serving}, timeout=BEAT_S / 10)
        if not serving.done():
            ready()
        while not serving.done():
            server.should_exit |= door.stop.is_set()
            if server.should_exit and draining is None:
                draining = asyncio.ensure_future(asyncio.to_thread(service.worker.close, door.limits.grace_s))
            await asyncio.wait({serving}, timeout=BEAT_S)
    finally:
        server.should_exit = True
        await serving
        if draining is not None:
            await draining


@contextmanager
def _claimed(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, had before anything slow is done. Early clients wait in its backlog."""
    if not 0 <= port <= 65535:  # getaddrinfo would take the rest of the division
        raise ServeError(f"there is no port {port}", hint="ports go up to 65535; 0 takes a free one")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        claimed = socket.socket(family, kind, proto)
    except OSError as error:
        raise _unusable(host, port, error) from error
    with claimed:
        try:
            claimed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            claimed.bind(address)
            claimed.listen(2048)
        except OSError as error:
            raise _unusable(host, port, error) from error
        yield claimed


def _unusable(host: str, port: int, error: Exception) -> ServeError:
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return ServeError(f"port {port} is in use", hint="stop what listens there, or let --port 0 find one")
    if number == errno.EACCES:
        return ServeError(f"port {port} needs more rights than we have", hint="choose a port above 1023")
    return ServeError(f"cannot listen on {host!r} port {port}: {error}", hint="use --host 127.0.0.1")


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and Ctrl-C set `stop`. uvicorn takes them over while it runs and raises them anew at its end,
    which without this would kill the process that has just shut down in good order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_tls(door: Door) -> None:
    """Keys and prompts do not cross a network in the clear, unless somebody says that they may."""
    given = [path for path in (door.secure.cert, door.secure.key) if path is not None]
    if len(given) == 1:
        raise ServeError("TLS takes a certificate and its key", hint="give both --tls-cert and --tls-key")
    for path in given:
        if not path.is_file():
            raise ServeError("this TLS file cannot be read", where=str(path))
    if given:
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*map(str, given))
        except (ssl.SSLError, OSError) as error:
            raise ServeError(f"certificate and key cannot be used: {error}", where=str(given[0])) from error
    elif not door.secure.insecure and not _is_loopback(door.host):
        raise ServeError(
            f"{door.host} can be reached from other machines, and keys would cross the network in the clear",
            hint="give --tls-cert and --tls-key; or --insecure behind a proxy that speaks TLS",
        )


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return True  # it cannot be listened on either; that error says more
    return all(ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for *_, address in found)


def _allow_files(most: int) -> None:
    """A process may often open fewer files than it would be let: then connections are left unanswered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _url(claimed: socket.socket, tls: bool) -> str:
    host, port = claimed.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
