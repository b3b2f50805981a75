"""What the evaluate, release and monitor stages read, made small: dataset, base, plan and a trained adapter.

The adapter is random but not empty, so base and tuned answer differently; nobody is right except by chance.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from luthier import artifacts
from luthier.recipe import Evaluate, Monitor, Release
from luthier.stages import Event, Inputs
from tests.inference.test_generate import make_adapter
from tests.stages.training import records

SEED = 17
BASE_DIGEST = "0123456789abcdef" * 4
LABELS = ("yes", "no")


def evaluate_section(**changes: Any) -> Evaluate:
    settings = {
        "labels": LABELS, "positive": "yes", "max_new_tokens": 4, "latency_requests": 3,
        "baselines": [{"name": "tfidf"}, {"name": "best_prompt", "shots": 0, "validation_rows": 4}],
    }  # fmt: skip
    return Evaluate.model_validate(settings | changes)


def release_section(*gates: dict[str, Any]) -> Release:
    wanted = gates or ({"name": "floor", "minimum": 0.0}, {"name": "parity", "rows": 4})
    return Release.model_validate({"gates": wanted, "intended_use": "tests", "limits": "not for use"})


def monitor_section(**changes: Any) -> Monitor:
    return Monitor.model_validate(changes)


def trained(folder: Path, base: Path) -> Inputs:
    """Sealed artefacts of data, model, plan and train below `folder`, as evaluate is handed them."""
    data, model, plan, train = (folder / name for name in ("data", "model", "plan", "train"))
    splits = {"train": records(40), "validation": records(8, 2), "test": records(24, 3)}
    (data / "rows").mkdir(parents=True)
    for split, rows in splits.items():
        artifacts.write_jsonl(data / "rows" / f"{split}.jsonl", rows)
    card = {
        "version": "fedcba9876543210" * 4,
        "sources": [{"licence": "MIT", "purpose": "tests"}],
        "splits": {split: {"rows": len(rows)} for split, rows in splits.items()},
    }
    artifacts.write_json(data / "card.json", card)
    artifacts.link_tree(base, model / "base")
    about = {
        "digest": BASE_DIGEST, "source": {"name": "files"}, "architecture": "LlamaForCausalLM",
        "parameters": 90_000, "licence": "Apache-2.0", "dtype": "float32",
    }  # fmt: skip
    artifacts.write_json(model / "base.json", about)
    plan.mkdir()
    artifacts.write_json(plan / "plan.json", {"threads": 1})
    train.mkdir()
    made = make_adapter(base, folder / "made", seed=6)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (train / "adapter").mkdir(exist_ok=True)
        shutil.copyfile(made / name, train / "adapter" / name)
    phase = {
        "phase": {"objective": {"name": "sft"}, "method": {"name": "lora"}}, "base": BASE_DIGEST,
        "steps": 3, "useful_tokens": 900, "seed": SEED, "best_step": 3,
    }  # fmt: skip
    artifacts.write_json(train / "phase.json", phase)
    folders = {"data": data, "model": model, "plan": plan, "train": train}
    (folder / "scratch").mkdir()
    return Inputs(
        name="toy",
        artefacts=folders,
        digests={name: artifacts.seal(path) for name, path in folders.items()},
        root=folder,
        cache=folder / "cache",
        scratch=folder / "scratch",
        seed=SEED,
    )


def also(inputs: Inputs, **folders: Path) -> Inputs:
    """The same inputs and a few more artefacts, sealed here if they are not yet."""
    digests = {
        name: artifacts.verify(path) if (path / "manifest.json").exists() else artifacts.seal(path)
        for name, path in folders.items()
    }
    return replace(inputs, artefacts={**inputs.artefacts, **folders}, digests={**inputs.digests, **digests})


def heard(inputs: Inputs) -> tuple[Inputs, list[Event]]:
    events: list[Event] = []
    return replace(inputs, tell=events.append), events


def stopping_after(calls: int) -> Callable[[], bool]:
    """Someone asks to stop between the first question and the `calls`th."""
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > calls

    return stopping
