"""Every route that the app really has, whoever added it: for tests that must hold for all of them."""

from __future__ import annotations

import re
from pathlib import Path

from fastapi.routing import iter_route_contexts

from luthier.home import Home
from luthier.http.app import create_app
from luthier.serving.service import Service
from luthier.store import Store
from luthier.uploads import Uploads

PARAM = re.compile(r"\{[^}]*\}")


def every(folder: Path) -> list[tuple[str, str]]:
    """(method, path template) of every route; HEAD goes with GET and is refused by the gate."""
    home = Home.at(folder)
    store = Store.open(home.path)
    app = create_app(Service(store, home), "not a real key", Uploads(store, home))
    found = {
        (method, str(route.path))
        for route in iter_route_contexts(app.routes)
        for method in route.methods or set()
        if method != "HEAD"
    }
    store.close()
    return sorted(found)
