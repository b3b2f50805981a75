"""luthier: raw rows to a governed, served, reversible fine-tuned language model.

    import luthier
    outcome = luthier.run("examples/guard.yaml", tell=print)
    luthier.promote("guard")

The public names below load what they need when first used, so importing luthier is quick.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Torch's threads wait for each other by spinning. On a machine with other work a spinning thread keeps the
# very core from the one it waits for, and training slows tenfold (docs/LOG.md, 2026-11-22). Spin briefly.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# oneDNN keeps 1,024 compiled products, one for every shape it met; packed batches have new shapes at every
# step, and memory grew by a gigabyte in 200 of them. A step needs about forty.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")  # torch's layer above it has a cache of 1,024 of its own

if TYPE_CHECKING:
    from luthier.api import (
        chat,
        compare,
        doctor,
        lineage,
        monitor,
        parts,
        plan,
        promote,
        releases,
        rollback,
        run,
        runs,
        show,
    )
    from luthier.errors import LuthierError
    from luthier.http import serve
    from luthier.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "LuthierError", "Recipe", "chat", "compare", "doctor", "lineage", "monitor", "parts", "plan", "promote",
    "releases", "rollback", "run", "runs", "serve", "show",
]  # fmt: skip

_ELSEWHERE = {"LuthierError": "luthier.errors", "Recipe": "luthier.recipe", "serve": "luthier.http"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'luthier' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_ELSEWHERE.get(name, "luthier.api")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
