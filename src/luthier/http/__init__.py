"""The HTTP door: OpenAI's chat API over the service, bound to this machine and closed by a key.

`serve` is the whole of it for callers; what the door takes in is in `chat`, how it answers in `exchange`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(
    *,
    home: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8321,
    key: str | None = None,
    announce: Callable[[dict[str, Any]], None] = lambda ready: None,
) -> None:
    """Serve every release until SIGTERM or Ctrl-C. Promotions and rollbacks are followed at once.

    port:     0 takes a free one.
    key:      what clients must send as a bearer token; without one a new key is made.
    announce: called with {"url", "key"} once requests will be answered.
    """
    from luthier.home import Home
    from luthier.http import server
    from luthier.store import Store

    opened = Home.at(home)
    server.serve(Store.open(opened.database), opened, server.Door(host=host, port=port, key=key), announce)
