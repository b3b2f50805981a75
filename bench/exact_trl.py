"""Whether luthier and TRL learn the same: 50 float32 steps from one adapter, loss against loss.

    python bench/exact_trl.py ROWS_FOLDER RESULT.json [--workload guard] [--steps 50]

Both train the same rows in the same order with the same settings, each in its own process and environment;
luthier packs and fuses, TRL pads. The largest difference of a step's loss must be below 1e-4. It does not
time anything.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from run import ALPHA, GROUPS, LR, RANK, SEED, initial, keep, machine, process

LIMIT = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="what workloads.py wrote")
    parser.add_argument("result", type=Path)
    parser.add_argument("--workload", default="guard")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    about = json.loads((asked.rows / "about.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        start = initial(about["base"], Path(scratch), asked.threads)
        job = {
            "base": about["base"], "rows": str((asked.rows / f"{asked.workload}.jsonl").absolute()),
            "steps": asked.steps, "batch": asked.batch, "rank": RANK, "alpha": ALPHA, "lr": LR,
            "seed": SEED, "threads": asked.threads, "variant": "exact", "dtype": "float32",
            "scratch": scratch, "adapter": start,
        }  # fmt: skip
        answers = {name: process(name, job) for name in ("luthier", "trl")}
    result = compared(answers) | {
        "workload": asked.workload, "steps": asked.steps, "batch": asked.batch, "dtype": "float32",
        "base_sha256": about["base_sha256"], "rows_sha256": about["workloads"][asked.workload]["sha256"],
        "settings": {"rank": RANK, "alpha": ALPHA, "lr": LR, "seed": SEED, "threads": asked.threads},
        "machine": machine(),
    }  # fmt: skip
    keep(asked.result, result)
    gap = result["largest_difference"]
    print(f"largest difference of a step's loss in {asked.steps} steps: {gap:.2e} (limit {LIMIT:g})")
    sys.exit(0 if gap < LIMIT else 1)


def compared(answers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Both curves and the largest difference between them."""
    for name, answer in answers.items():
        if "failed" in answer:
            raise SystemExit(f"{name} ({GROUPS['all'][name][1]}): {answer['failed']}")
    ours, theirs = answers["luthier"]["losses"], answers["trl"]["losses"]
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return {
        "largest_difference": max(gaps),
        "at_step": gaps.index(max(gaps)) + 1,
        "losses": {"luthier": ours, "trl": theirs},
        "versions": {name: answer["versions"] for name, answer in answers.items()},
    }


if __name__ == "__main__":
    main()
