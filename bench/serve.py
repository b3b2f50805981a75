"""Serving, side by side: every server answers the same requests, in turn, and all raw figures are kept.

    python bench/serve.py MADE_FOLDER RESULT.json [--systems luthier,vllm-lora,…] [--rounds 3]

    single     one client, one model after another: tokens a second of one stream
    adapter    16 clients, all of one adapter
    mixed      16 clients over eight adapters
    base       16 clients of the untouched base, where the server has it under that name
    prefill    one prompt of 1,120 tokens never seen before, one token asked for: prompt tokens a second
    open       requests arrive by a Poisson process, answered or not, over eight adapters: first token, gaps

Each round starts every server once (ABCABC …), so that what else happens on the machine falls on all of
them; the three loads of 16 clients begin with another one each round, for the same reason. `adapters cost`
is what `adapter` and `mixed` fall short of the same round's `base`. The result is written after every
server; the same command goes on where it was stopped. MADE_FOLDER comes from serving/made.py. It does not
know how a server is started: serving/systems.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from run import HERE, keep, machine
from serving.systems import ADAPTERS, Server, peak_rss_bytes, started

SYSTEMS = ("luthier", "vllm-lora", "vllm-merged", "llamacpp", "peft")
SERIAL = ("peft",)  # answers one request after another: what 16 clients get is what one gets
TOKENS, STREAMS, WAVES = 128, 16, 2
OPEN = {"rate_per_s": 1.0, "requests": 30, "tokens": 64}
PORT = 8477
LIMIT_S = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("made", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    about = json.loads((asked.made / "about.json").read_text("utf-8"))
    settings = {
        "tokens": TOKENS,
        "streams": STREAMS,
        "waves": WAVES,
        "open": OPEN,
        "threads": asked.threads,
        **about,
    }
    settings.pop("base")
    result: dict[str, Any] = {"settings": settings, "machine": machine(), "runs": [], "summary": {}}
    if asked.result.exists():
        result = json.loads(asked.result.read_text("utf-8"))
    for turn in range(1, asked.rounds + 1):
        for system in asked.systems.split(","):
            if any((run["system"], run["round"]) == (system, turn) for run in result["runs"]):
                continue
            run = once(system, asked.made.absolute(), asked.threads, turn)
            result["runs"].append({"system": system, "round": turn, **run})
            result["summary"] = summary(result["runs"])
            keep(asked.result, result)
            print(f"round {turn}  {system:12} {run.get('failed') or result['summary'][system]}", flush=True)
    print(show(result["summary"]))


def once(system: str, made: Path, threads: int, turn: int) -> dict[str, Any]:
    """One life of one server: started, asked everything, ended."""
    load = round(os.getloadavg()[0], 2)
    prompts = json.loads((made / "prompts.json").read_text("utf-8"))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        log = Path(scratch) / "server.log"
        try:
            with started(system, made, PORT, threads, log) as server:
                figures = {
                    name: drive(server, job, Path(scratch))
                    for name, job in jobs(system, server, prompts, turn).items()
                }
                peak = peak_rss_bytes(server.pid)
        except SystemExit as error:
            return {"load_before": load, "failed": f"{error}: {log.read_text('utf-8')[-800:]}"}
    return {"load_before": load, **server.facts, "peak_rss_bytes": peak, **figures}


def jobs(system: str, server: Server, prompts: dict[str, Any], turn: int) -> dict[str, dict[str, Any]]:
    """What is asked, by name; prompts of a round are its own, so no cache of an earlier one helps."""
    draw = random.Random(f"serve:{turn}")
    short, long = (draw.sample(prompts[kind], len(prompts[kind])) for kind in ("short", "long"))

    def asked(models: list[str], count: int, tokens: int = TOKENS, texts: list[str] = short) -> list[Any]:
        found = []
        for n in range(count):
            which = models[n % len(models)]
            more = (
                {"lora": [{"id": int(which[1:]) - 1, "scale": 1.0}]}
                if system == "llamacpp" and which != "base"
                else {}
            )
            text = f"{draw.randrange(10**6)} {texts[n % len(texts)]}"
            model = "base" if system == "llamacpp" else server.models[which]
            found.append({"model": model, "prompt": text, "max_tokens": tokens, "more": more})
        return found

    adapters = [name for name in ADAPTERS if name in server.models]
    some = adapters if len(adapters) > 1 else []
    many = STREAMS * WAVES
    found: dict[str, dict[str, Any]] = {"single": {"streams": 1, "requests": asked(["a1"], 3)}}
    if "base" in server.models:
        found["single base"] = {"streams": 1, "requests": asked(["base"], 3)}
    found["prefill"] = {"streams": 1, "requests": asked(["a1"], 4, 1, long)}
    if system in SERIAL:
        return found
    loads = {"adapter": ["a1"], "base": ["base"] if "base" in server.models else [], "mixed": some}
    turned = [name for name in (*loads, *loads)[turn % 3 :][:3] if loads[name]]
    found |= {name: {"streams": STREAMS, "requests": asked(loads[name], many)} for name in turned}
    arrivals = asked(some or adapters, OPEN["requests"], int(OPEN["tokens"]))
    at = 0.0
    for request in arrivals:
        at += draw.expovariate(OPEN["rate_per_s"])
        request["at_s"] = at
    found["open"] = {"requests": arrivals}
    return found


def drive(server: Server, job: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """The load as a process of its own, and its figures."""
    file = scratch / "job.json"
    file.write_text(json.dumps({"url": server.url, "key": server.key, **job}), "utf-8")
    done = subprocess.run(
        [sys.executable, str(HERE / "serving" / "load.py"), str(file)],
        capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"the load failed: {done.stderr[-500:]}")
    found = json.loads(done.stdout)
    good = [request for request in found["requests"] if "failed" not in request]
    figures: dict[str, Any] = {
        "seconds": round(found["seconds"], 3),
        "answered": len(good),
        "asked": len(job["requests"]),
    }
    if failed := [request["failed"] for request in found["requests"] if "failed" in request]:
        figures["failures"] = failed[:3]
    if good:
        written, read = (
            sum(request[kind] for request in good) for kind in ("completion_tokens", "prompt_tokens")
        )
        first = sorted(request["first_s"] or request["total_s"] for request in good)
        gaps = sorted(gap for request in good for gap in request["gaps_s"])
        figures |= {
            "tokens_per_s": round(written / found["seconds"], 1),
            "prompt_tokens_per_s": round(read / sum(request["total_s"] for request in good), 1),
            "first_p50_s": share(first, 0.5), "first_p95_s": share(first, 0.95),
            "gap_p50_s": share(gaps, 0.5), "gap_p95_s": share(gaps, 0.95),
        }  # fmt: skip
    return figures


def share(values: list[float], part: float) -> float | None:
    return round(values[min(len(values) - 1, int(part * len(values)))], 4) if values else None


WANTED = (
    ("single", "tokens_per_s"), ("single base", "tokens_per_s"), ("adapter", "tokens_per_s"),
    ("base", "tokens_per_s"), ("mixed", "tokens_per_s"), ("prefill", "prompt_tokens_per_s"),
    ("open", "first_p95_s"), ("open", "gap_p95_s"),
)  # fmt: skip


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{system: {"load figure": [median, lowest, highest]}} over the rounds so far."""
    found: dict[str, dict[str, Any]] = {}
    for system in dict.fromkeys(run["system"] for run in runs):
        mine = [run for run in runs if run["system"] == system and "failed" not in run]
        figures: dict[str, Any] = {}
        for load, figure in WANTED:
            values = [run[load][figure] for run in mine if run.get(load, {}).get(figure) is not None]
            if values:
                figures[f"{load} {figure}"] = [median(values), min(values), max(values)]
        for load in ("adapter", "mixed"):
            costs = [1 - run[load]["tokens_per_s"] / run["base"]["tokens_per_s"]
                     for run in mine if load in run and "base" in run]  # fmt: skip
            if costs:
                figures[f"{load} cost"] = [round(of(costs), 3) for of in (median, min, max)]
        if mine:
            figures["peak_gb"] = round(median(run["peak_rss_bytes"] for run in mine) / 1e9, 2)
        found[system] = figures
    return found


def show(found: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    heads = [f"{load}, {figure.removesuffix('_s').replace('_', ' ')}" for load, figure in WANTED]
    heads += ["adapters cost, one", "eight", "peak GB"]
    lines = ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for system, figures in found.items():
        cells = []
        for load, figure in WANTED:
            value = figures.get(f"{load} {figure}")
            digits = 3 if figure.endswith(("p95_s", "p50_s")) else 0
            cells.append(
                f"{value[0]:.{digits}f} ({value[1]:.{digits}f}–{value[2]:.{digits}f})" if value else ""
            )
        for load in ("adapter", "mixed"):
            cost = figures.get(f"{load} cost")
            cells.append("{:.0%} ({:.0%}–{:.0%})".format(*cost) if cost else "")
        lines.append(f"| {system} | " + " | ".join(cells) + f" | {figures.get('peak_gb', '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
