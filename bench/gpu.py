"""luthier's engine against plain PEFT and transformers on one GPU, in one call of less than ten minutes.

    python bench/gpu.py RESULT.json [--budget 540] [--rounds 3] [--systems luthier,peft]
    python bench/gpu.py /tmp/tiny.json --tiny --device cpu      # the code path alone, in a minute

An 8B-shape Llama with random weights (speed does not depend on what they are), bf16, LoRA r=16 on all linear
layers. Two workloads: `full` rows of 4,096 tokens, as the public anchor has them (NeMo AutoModel, LoRA on one
H100: 12.5 K tokens/s, 402 TFLOP/s), and `mixed` rows of chat length, which luthier packs and PEFT pads. Every
run is a fresh process, systems take turns, and no run begins that would end after the budget. TFLOP/s are
counted as the anchor's are, 4 per parameter and token; their limit is what one large bf16 product reaches
here. It needs luthier's environment with a CUDA build of torch, and flash-attn only if it is there.

Not known: several GPUs, 4 bit, other trainers. No result of it exists yet: see README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "systems"))
import gpu_run
from gpu_run import WORKLOADS, Job

SYSTEMS = ("luthier", "peft", "peft-checkpointed")
ANCHORS = {"public_tokens_per_s": 12473, "public_tflops_4p": 402, "target_tokens_per_s": 16000}
TAIL = 1500


def main() -> None:
    asked = arguments()
    if asked.job:
        print(json.dumps(gpu_run.run(Job(**json.loads(asked.job)))))
        return
    began, took = time.monotonic(), dict.fromkeys(asked.systems, 0.0)
    result: dict[str, Any] = {"measured": asked.device != "cpu", "anchors": ANCHORS, "runs": []}
    for turn in range(1, asked.rounds + 1):
        for system in asked.systems:
            if took[system] and time.monotonic() - began + took[system] > asked.budget:
                continue
            left = max(60.0, asked.budget - (time.monotonic() - began))
            started = time.monotonic()
            found = process(job(asked, system), left)
            took[system] = time.monotonic() - started
            result["runs"].append(
                {"system": system, "round": turn, "wall_s": round(took[system], 1), **found}
            )
            result["summary"] = summary(result["runs"])
            keep(asked.result, result)
            print(f"round {turn}  {system:18} {took[system]:.0f} s  {said(found)}", flush=True)
    print(show(result["summary"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, nargs="?", default=Path("gpu.json"))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a shape that a CPU trains in seconds")
    parser.add_argument("--at-once", type=int, default=2, help="rows of full length in a micro-batch")
    parser.add_argument("--micros", type=int, default=2, help="micro-batches in an optimiser step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.systems = asked.systems.split(",")
    if unknown := set(asked.systems) - set(SYSTEMS):
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    return asked


def job(asked: argparse.Namespace, system: str) -> Job:
    return Job(
        system=system, device=asked.device, shape="tiny" if asked.tiny else "8b",
        length=64 if asked.tiny else 4096, at_once=asked.at_once, micros=asked.micros, steps=asked.steps,
        warmup=min(3, asked.steps - 1),
    )  # fmt: skip


def process(wanted: Job, limit_s: float) -> dict[str, Any]:
    """A run in a process of its own: what it answers, or its last words."""
    command = [sys.executable, __file__, "--job", json.dumps(vars(wanted))]
    surroundings = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit_s, env=surroundings, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {limit_s:.0f} s"}
    if done.returncode or not done.stdout.strip():
        return {"failed": f"exit {done.returncode}: {done.stderr[-TAIL:]}"}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{workload: {system: median figures}}; the first losses tell whether all trained the same."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for workload in WORKLOADS:
        systems: dict[str, dict[str, Any]] = {}
        for name in dict.fromkeys(run["system"] for run in runs):
            mine = [run.get("workloads", {}).get(workload, run) for run in runs if run["system"] == name]
            good = [figures for figures in mine if "failed" not in figures]
            if not good:
                systems[name] = {"failed": mine[-1]["failed"].strip().splitlines()[-1]}
                continue
            rates = [figures["tokens_per_s"] for figures in good]
            systems[name] = {
                "runs": len(good), "tokens_per_s": median(rates), "low": min(rates), "high": max(rates),
                "reserved_gb": round(max(figures["reserved_bytes"] for figures in good) / 1e9, 2),
                "tflops_4p": median(figures["tflops_4p"] for figures in good),
                "of_limit": median(figures["of_limit"] for figures in good),
                "first_loss": round(good[0]["losses"][0], 4),
            }  # fmt: skip
        found[workload] = systems
    return found


def said(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"].strip().splitlines()[-1])
    rates = {name: figures.get("tokens_per_s", "failed") for name, figures in found["workloads"].items()}
    return ", ".join(f"{name} {rate}" for name, rate in rates.items())


def show(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The figures as Markdown."""
    heads = ["system", "useful tokens/s", "spread", "TFLOP/s (4P)", "of limit", "reserved", "first loss"]
    lines: list[str] = []
    for workload, systems in found.items():
        lines += ["", f"### {workload}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        for name, all_ in systems.items():
            if "failed" in all_:
                lines.append(f"| {name} | failed: {all_['failed'][:90].replace('|', ' ')} |" + " |" * 5)
                continue
            lines.append(
                f"| {name} | {all_['tokens_per_s']:.0f} | {all_['low']:.0f}–{all_['high']:.0f} | "
                f"{all_['tflops_4p']:.4g} | {all_['of_limit']:.0%} | {all_['reserved_gb']:.1f} GB | "
                f"{all_['first_loss']:.4f} |"
            )
    return "\n".join(lines)


def keep(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
