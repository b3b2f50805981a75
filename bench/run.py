"""The benchmark's runner: every run a fresh process, systems taking turns, all raw runs kept.

    python bench/run.py ROWS_FOLDER RESULT.json [--systems rivals] [--workloads chat]

Each round goes through the systems once (ABCABC …), so that what else happens on the machine falls on all of
them. The result is written after every run; the same command goes on where it was stopped. With `--looks 10`
every system's adapter is kept every 10 steps and its held-out loss measured, by one code for all.

It does not know how a system trains: `systems/` does. It runs in luthier's environment; rivals have their
own under `peers/.venvs`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from table import show, summary

from luthier.forecast import host

HERE = Path(__file__).parent
# name: (environment, script, variant)
RIVALS = {
    "luthier": ("luthier", "luthier_run.py", "full"),
    "trl": ("trl", "trl_run.py", "defaults"),
    "trl-best": ("trl", "trl_run.py", "best"),
    "unsloth": ("unsloth", "unsloth_run.py", "defaults"),
    "unsloth-compile": ("unsloth", "unsloth_run.py", "compile"),
    "unsloth-best": ("unsloth", "unsloth_run.py", "best"),
    "llamafactory": ("llamafactory", "llamafactory_run.py", "defaults"),
    "llamafactory-neat": ("llamafactory", "llamafactory_run.py", "neat"),
    "llamafactory-best": ("llamafactory", "llamafactory_run.py", "best"),
}
ABLATIONS = {
    "luthier": RIVALS["luthier"],
    **{
        f"luthier-{variant}": ("luthier", "luthier_run.py", variant)
        for variant in (
            "flat",
            "padded",
            "plain-layers",
            "uncompiled",
            "sdpa",
            "grouped",
            "torch-products",
            "whole-head",
            "glibc",
        )
    },
}
GROUPS = {"rivals": RIVALS, "ablations": ABLATIONS, "all": RIVALS | ABLATIONS}
RANK, ALPHA, LR, SEED = 16, 32, 2e-4, 17
LIMIT_S = 3600
TAIL = 1500  # characters of a failed run's last words


def main() -> None:
    asked = arguments()
    about = json.loads((asked.rows / "about.json").read_text("utf-8"))
    result = begin(asked, about)
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        start = initial(about["base"], Path(scratch), asked.threads)
        for workload in asked.workloads:
            for turn in range(1, asked.rounds + 1):
                for system in asked.systems:
                    if known(result, (workload, system, turn)):
                        continue
                    run = once(asked, about, (workload, system), (start, Path(scratch)))
                    result["runs"].append({"workload": workload, "system": system, "round": turn, **run})
                    result["summary"] = summary(result)
                    keep(asked.result, result)
                    said = run.get("tokens_per_s") or run["failed"].splitlines()[-1:]
                    print(f"{workload:8} round {turn}  {system:22} {said}", flush=True)
    print(show(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="what workloads.py wrote")
    parser.add_argument("result", type=Path)
    parser.add_argument("--systems", default="rivals", help=f"{', '.join(GROUPS)}, or names with commas")
    parser.add_argument("--workloads", default="chat,equal,prefix,guard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2, help="steps of a run that are not counted")
    parser.add_argument("--steps", type=int, help="of a run; default: the workload's own number")
    parser.add_argument("--batch", type=int, help="rows of a step; default: the workload's own number")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the faster one here")
    parser.add_argument("--looks", type=int, default=0, help="held-out loss every so many steps")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    asked.systems = list(GROUPS.get(asked.systems, asked.systems.split(",")))
    asked.workloads = asked.workloads.split(",")
    asked.host = host.probe()  # a second's measurement
    asked.dtype = asked.dtype or asked.host.dtype
    if unknown := [name for name in asked.systems if name not in GROUPS["all"]]:
        parser.error(f"no such system: {', '.join(unknown)}; there are {', '.join(GROUPS['all'])}")
    return asked


def begin(asked: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    """A new result, or the one that was begun with the same settings and rows."""
    settings = {
        "rank": RANK, "alpha": ALPHA, "lr": LR, "schedule": "constant", "seed": SEED, "steps": asked.steps,
        "warmup": asked.warmup, "looks": asked.looks, "threads": asked.threads, "batch": asked.batch,
        "dtype": asked.dtype,
    }  # fmt: skip
    rows = {name: about["workloads"][name] for name in asked.workloads}
    fresh = {
        "settings": settings, "base_sha256": about["base_sha256"], "workloads": rows,
        "machine": machine() | asked.host.as_dict(),
        "runs": [], "summary": {},
    }  # fmt: skip
    if not asked.result.exists():
        return fresh
    found: dict[str, Any] = json.loads(asked.result.read_text("utf-8"))
    for key in ("settings", "base_sha256"):
        if found[key] != fresh[key]:
            raise SystemExit(f"{asked.result} was begun with other {key}; name another file")
    found["workloads"] |= rows
    return found


def machine() -> dict[str, Any]:
    """What the runs ran on."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def known(result: dict[str, Any], run: tuple[str, str, int]) -> bool:
    return any((done["workload"], done["system"], done["round"]) == run for done in result["runs"])


def keep(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    partial.replace(path)


def initial(base: str, scratch: Path, threads: int) -> str:
    """The adapter that every system starts from: luthier's own start, as plain PEFT files."""
    job = {
        "base": base, "rows": os.devnull, "steps": 0, "batch": 1, "rank": RANK, "alpha": ALPHA, "lr": LR,
        "seed": SEED, "threads": threads, "variant": "exact", "dtype": "float32", "scratch": str(scratch),
        "adapter": str(scratch / "start"),
    }  # fmt: skip
    done = process("luthier", job)
    if "failed" in done:
        raise SystemExit(done["failed"])
    return str(job["adapter"])


def once(
    asked: argparse.Namespace, about: dict[str, Any], what: tuple[str, str], where: tuple[str, Path]
) -> dict[str, Any]:
    """One run of one system, with its figures."""
    workload, system = what
    start, scratch = where
    steps = asked.steps or about["workloads"][workload]["steps"]
    own = Path(tempfile.mkdtemp(dir=scratch))
    job = {
        "base": about["base"], "rows": str((asked.rows / f"{workload}.jsonl").absolute()), "steps": steps,
        "batch": asked.batch or about["workloads"][workload]["batch"], "rank": RANK, "alpha": ALPHA, "lr": LR,
        "seed": SEED, "threads": asked.threads, "variant": GROUPS["all"][system][2], "dtype": asked.dtype,
        "scratch": str(own), "adapter": start,
        "looks": list(range(asked.looks, steps + 1, asked.looks)) if asked.looks else [],
    }  # fmt: skip
    load = os.getloadavg()[0]
    run = {"load_before": round(load, 2), **process(system, job)}
    if "failed" not in run:
        counted = slice(min(asked.warmup, steps - 1), None)
        run["tokens_per_s"] = round(sum(run["tokens"][counted]) / sum(run["seconds"][counted]), 1)
        if kept := run.pop("kept"):
            held_out = (asked.rows / f"{workload}.heldout.jsonl").absolute()
            run["held_out"] = curve(job, run["seconds"], [start, *kept], str(held_out))
    shutil.rmtree(own)
    return run


def process(system: str, job: dict[str, Any]) -> dict[str, Any]:
    """The script of a system on a job, in its own environment; what it answers, or how it failed."""
    place, script, _ = GROUPS["all"][system]
    python = sys.executable if place == "luthier" else HERE / "peers" / ".venvs" / place / "bin" / "python"
    if not Path(python).exists():
        return {"failed": f"no environment for {place}: make bench-peers"}
    command = [str(python), str(HERE / "systems" / script), json.dumps(job)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            cwd=job["scratch"],
            env=surroundings(job),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"longer than {LIMIT_S} s"}
    if done.returncode or not done.stdout.strip():
        return {"failed": f"exit {done.returncode}: {done.stderr[-TAIL:]}"}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def surroundings(job: dict[str, Any]) -> dict[str, str]:
    """The same environment for all: as many threads as asked for, and no hub."""
    return os.environ | {
        "OMP_NUM_THREADS": str(job["threads"]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HOME": str(Path(job["scratch"]) / "hub"),
    }


def curve(job: dict[str, Any], seconds: list[float], adapters: list[str], rows: str) -> list[list[float]]:
    """[step, seconds of training until then, held-out loss] from step 0 on."""
    command = [sys.executable, str(HERE / "systems" / "heldout.py"), job["base"], rows, str(job["threads"])]
    done = subprocess.run(
        [*command, *adapters], capture_output=True, text=True, env=surroundings(job), check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-TAIL:])
    losses = json.loads(done.stdout.strip().splitlines()[-1])
    steps = [0, *job["looks"]]
    return [[at, round(sum(seconds[:at]), 2), loss] for at, loss in zip(steps, losses, strict=True)]


if __name__ == "__main__":
    main()
