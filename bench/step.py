"""Where the time of a training step goes: seconds of its parts, and how fast its products are.

    python bench/step.py bench/.rows RESULT.json [--workloads chat,equal] [--steps 10] [--warmup 4]

luthier's engine as `systems/luthier_run.py` runs it, with a clock around every formula and product. What a
part calls within itself counts there alone; what no clock is around is `rest`: the optimiser, casts, residual
sums, embeddings, autograd and Python. A number multiplied and added is two operations. On a CPU with AMX
attention's products are torch's and fall under `rest`.

It does not know the other systems.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import run

sys.path.insert(0, str(Path(__file__).parent / "systems"))
import luthier_run
from meter import Job

from luthier.engine import flash, head

THIN = 4 * run.RANK  # columns: fewer are an adapter's


class Clock:
    """Seconds and operations by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, float] = defaultdict(float)
        self._inside: list[float] = [0.0]  # of each call that is open: seconds of those within it

    def timed(
        self, name: str, work: Callable[..., Any], operations: Callable[..., float] | None = None
    ) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return work(*given)
            finally:
                took = time.perf_counter() - began
                self.seconds[name] += took - self._inside.pop()
                self._inside[-1] += took
                self.operations[name] += operations(*given) if operations else 0

        return call


def watch(clock: Clock, kernels: Any) -> Any:
    """The same formulas, timed; attention and the head as well."""
    wide, thin = (
        clock.timed(name, kernels.total, product_operations) for name in ("wide products", "thin products")
    )
    library, scores = flash._library, head.token_scores

    def attention(dtype: Any) -> Any:
        known = library(dtype)
        there, back = (clock.timed("attention", call) for call in (known.flash_there, known.flash_back))
        return SimpleNamespace(flash_there=there, flash_back=back, flash_has=known.flash_has)

    flash._library = attention
    head.token_scores = clock.timed(
        "head's products", scores, lambda h_N_E, w_V_E, *_: 4.0 * len(h_N_E) * w_V_E.numel()
    )
    return replace(
        kernels,
        total=lambda x, w, more=None: (thin if min(x.shape[1], w.shape[1]) <= THIN else wide)(x, w, more),
        outer=clock.timed(
            "thin products", kernels.outer, lambda x, y: 2.0 * len(x) * x.shape[1] * y.shape[1]
        ),
        norm=clock.timed("norms", kernels.norm),
        norm_backward=clock.timed("norms", kernels.norm_backward),
        **{
            name: clock.timed("attention", getattr(kernels, name))
            for name in ("soften", "soften_backward", "turn", "unturn")
        },
        gate={name: clock.timed("gate", work) for name, work in kernels.gate.items()},
        gate_backward={name: clock.timed("gate", work) for name, work in kernels.gate_backward.items()},
        settle=clock.timed("head's softmax", kernels.settle),
    )


def product_operations(x: Any, w: Any, more: Any) -> float:
    depth = x.shape[1] + (more[0].shape[1] if more else 0)
    return 2.0 * len(x) * depth * w.shape[1]


def main() -> None:
    asked = arguments()
    about = json.loads((asked.rows / "about.json").read_text("utf-8"))
    found = {"machine": run.machine() | asked.host.as_dict(), "dtype": asked.dtype, "workloads": {}}
    plain = flash._library, head.token_scores
    for workload in asked.workloads:
        clock = Clock()
        seconds, tokens = steps(asked, about, workload, clock)
        flash._library, head.token_scores = plain
        found["workloads"][workload] = told(clock, seconds, tokens)
        run.keep(asked.result, found)
        print(table(workload, found["workloads"][workload]), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, help="what workloads.py wrote")
    parser.add_argument("result", type=Path)
    parser.add_argument("--workloads", default="chat,equal")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    if asked.warmup >= asked.steps:
        parser.error("--warmup leaves no step to count")
    asked.workloads = asked.workloads.split(",")
    asked.host = run.host.probe()
    asked.dtype = asked.host.dtype
    return asked


def steps(asked: Any, about: Any, workload: str, clock: Clock) -> tuple[list[float], list[int]]:
    """Seconds and useful tokens of each counted step; the clock has run for these alone."""
    with tempfile.TemporaryDirectory(prefix="step-") as scratch:
        job = Job(
            base=about["base"], rows=str(asked.rows / f"{workload}.jsonl"), steps=asked.steps,
            batch=about["workloads"][workload]["batch"], rank=run.RANK, alpha=run.ALPHA, lr=run.LR,
            seed=run.SEED, threads=asked.threads, variant="full", dtype=asked.dtype, scratch=scratch,
        )  # fmt: skip
        ideas = luthier_run.VARIANTS["full"]
        kernels = watch(clock, luthier_run.formulas(ideas))
        _, done = luthier_run.training(job, ideas, kernels, luthier_run.encoded(job.read()))
        seconds, tokens = [], []
        for step in done:
            if step.step <= asked.warmup:
                clock.seconds.clear()
                clock.operations.clear()
                continue
            seconds.append(step.seconds)
            tokens.append(step.tokens)
    return seconds, tokens


def told(clock: Clock, seconds: list[float], tokens: list[int]) -> dict[str, Any]:
    whole = sum(seconds)
    parts = {**clock.seconds, "rest": whole - sum(clock.seconds.values())}
    products = sum(each for name, each in parts.items() if name.endswith("products"))
    found: dict[str, Any] = {}
    for name, each in sorted(parts.items(), key=lambda item: -item[1]):
        found[name] = {"seconds": round(each / len(seconds), 4), "share": round(each / whole, 4)}
        if operations := clock.operations.get(name):
            found[name]["gflops_per_s"] = round(operations / each / 1e9, 1)
    return {
        "step_s": [round(each, 3) for each in seconds],
        "tokens_per_s": round(sum(tokens) / whole, 1),
        "products_share": round(products / whole, 4),
        "parts": found,
    }


def table(workload: str, found: dict[str, Any]) -> str:
    lines = [
        f"{workload}: {found['tokens_per_s']} useful tokens/s, {found['products_share']:.1%} in products"
    ]
    for name, part in found["parts"].items():
        speed = f"{part['gflops_per_s']:7.1f} GFLOP/s" if "gflops_per_s" in part else ""
        lines.append(f"  {name:16} {part['seconds']:8.3f} s a step {part['share']:6.1%} {speed}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
