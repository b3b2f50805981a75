"""Embedded: luthier's own engine, in a process of its own beside the server, or in a thread of it.

Source: `serving.engine_process` and `serving.worker`; how its answers grow is docs/decisions/0007. It is what
serves where no backend is named. It does not know other machines.
"""

from __future__ import annotations

from pydantic import Field

from luthier import plugins
from luthier.home import Home
from luthier.serving.desk import Engine
from luthier.serving.engine_process import EngineProcess
from luthier.serving.limits import Limits
from luthier.serving.worker import Worker


class Params(plugins.Params):
    apart: bool = Field(default=True, description="in a process of its own, which comes back after a crash")
    threads: int | None = Field(default=None, ge=1)


def engine(params: Params, limits: Limits, home: Home) -> Engine:
    return (EngineProcess if params.apart else Worker)(limits, params.threads)
