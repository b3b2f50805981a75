"""A small real world for end-to-end tests: a tiny base, a learnable data set and a recipe, in one folder.

The task: a message of random words that begins with a word of one of two sets; the answer is `yes` or `no`.
"""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import make_tiny_base

LUTHIER = [sys.executable, "-m", "luthier.cli"]
ROWS = {"train": 160, "validation": 24, "test": 48}


def make_world(folder: Path) -> Path:
    """Write base, rows and recipe below `folder`; return the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tiny_base(folder / "base")
    draw = random.Random(5)
    for split, count in ROWS.items():
        with open(folder / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for n in range(count):
                words = " ".join("".join(draw.choices("cdefg", k=3)) for _ in range(draw.randint(1, 3)))
                writer.writerow([f"{'aaa' if n % 2 else 'bbb'} {split[0]}{n} {words}", n % 2])
    recipe = {
        "luthier": 1,
        "name": "toy",
        "data": {
            "sources": [
                {
                    "from": {"name": "files", "files": {split: f"{split}.csv" for split in ROWS}},
                    "licence": "MIT",
                    "purpose": "tests",
                    "chat": {"user": "{text}", "assistant": "{label}"},
                    "values": {"label": {"0": "no", "1": "yes"}},
                }
            ]
        },
        "model": {
            "from": {"name": "files", "files": {"model": "base"}},
            "licence": "Apache-2.0", "dtype": "float32",
        },
        "plan": {"max_length": 128, "threads": 1},
        "train": [
            {
                "objective": {"name": "sft"},
                "method": {"name": "lora", "r": 8, "alpha": 16},
                "steps": 30, "batch": 8, "lr": 1e-2, "checkpoint_every": 4,
                "validation": {"every": 10, "rows": 16, "patience": 5},
            }
        ],
        "evaluate": {
            "labels": ["yes", "no"], "positive": "yes", "max_new_tokens": 6, "latency_requests": 4,
            "baselines": [{"name": "tfidf"}],
        },
        "release": {
            "gates": [
                {"name": "floor", "minimum": 0.3}, {"name": "no_regression"}, {"name": "parity", "rows": 5},
            ],
            "intended_use": "tests", "limits": "do not use",
        },
    }  # fmt: skip
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
    return path


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"LUTHIER_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def luthier(home: Path, *words: str, code: int = 0, timeout: float = 240) -> Any:
    """Run the real command; return its JSON object when `--json` is among the words, else its stdout."""
    done = subprocess.run(
        [*LUTHIER, *words],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert "Traceback" not in done.stderr
    return (
        json.loads(done.stdout.strip().splitlines()[-1]) if "--json" in words else done.stdout + done.stderr
    )
