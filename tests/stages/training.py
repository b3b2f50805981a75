"""What the plan and train stages read, made small: a dataset, a base, a recipe and `Inputs` around them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from luthier import artifacts
from luthier.recipe import Phase, Plan, Planning
from luthier.rows import chat
from luthier.stages import Inputs

SEED = 17
PHASE: dict[str, Any] = {
    "steps": 12,
    "batch": 4,
    "lr": 5e-3,
    "warmup": 0.1,
    "checkpoint_every": 3,
    "method": {"name": "lora", "r": 4, "alpha": 8, "dropout": 0.1},
    "validation": {"every": 4, "rows": 6, "patience": 3},
}


def records(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Questions whose first letters say the answer."""
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        words = " ".join("".join(draw.choices("cdefg", k=3)) for _ in range(draw.randint(1, 4)))
        messages = [
            {"role": "user", "content": f"{'aaa' if n % 2 else 'bbb'} {seed}{n} {words}"},
            {"role": "assistant", "content": "yes" if n % 2 else "no"},
        ]
        rows.append(chat(messages, f"rows:{n + 1}").as_record())
    return rows


def phase(**changes: Any) -> Phase:
    return Phase.model_validate({**PHASE, **changes})


def planning(budget: dict[str, Any] | None = None, **changes: Any) -> Planning:
    return Planning(budget=Plan.model_validate({"threads": 1, **(budget or {})}), phases=(phase(**changes),))


def world(folder: Path, base: Path, rows: int = 40, validation: int = 8) -> Inputs:
    """Sealed dataset and model artefacts below `folder`."""
    data, model = folder / "data", folder / "model"
    for split, found in (("train", records(rows)), ("validation", records(validation, 2)), ("test", [])):
        (data / "rows").mkdir(parents=True, exist_ok=True)
        artifacts.write_jsonl(data / "rows" / f"{split}.jsonl", found)
    artifacts.link_tree(base, model / "base")
    dtype = {"float32": "float32", "bfloat16": "bfloat16"}[
        json.loads((base / "config.json").read_text())["dtype"]
    ]
    artifacts.write_json(model / "base.json", {"digest": "0123456789abcdef" * 4, "dtype": dtype})
    digests = {"data": artifacts.seal(data), "model": artifacts.seal(model)}
    (folder / "scratch").mkdir(exist_ok=True)
    return Inputs(
        name="toy",
        artefacts={"data": data, "model": model},
        digests=digests,
        root=folder,
        cache=folder / "cache",
        scratch=folder / "scratch",
        seed=SEED,
    )
