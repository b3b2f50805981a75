"""Stage 7, monitor: what was asked of a release, held against the release's own baseline.

The baseline is what the evaluate stage observed (single requests on the same machine). In a run the log is
the rehearsal's; later `luthier monitor` hands over the requests really served. A signal is fine, breached
(and then names an action), or open for lack of requests. It reads logs; it moves no alias.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luthier import artifacts, statistics
from luthier.stages import Inputs


def run(section: Any, inputs: Inputs, out: Path) -> dict[str, Any]:
    baseline = artifacts.read_json(inputs.artefacts["evaluate"] / "observed" / "efficiency.json")
    log = inputs.artefacts.get("requests")
    requests = artifacts.read_jsonl(log / "requests.jsonl") if log else []
    report = {"volume": volume(requests), "signals": signals(section, requests, baseline, inputs.name)}
    # Counts and latencies are observed: two runs of one recipe give the same digest, whatever the traffic.
    (out / "observed").mkdir(exist_ok=True)
    artifacts.write_json(out / "observed" / "report.json", report)
    artifacts.write_json(out / "watch.json", section.model_dump(mode="json"))
    return report


def volume(requests: list[dict[str, Any]]) -> dict[str, int]:
    """Counters: equal to a replay of the log, row by row."""
    return {
        "requests": len(requests),
        "errors": sum(request["status"] >= 500 for request in requests),
        "refused": sum(400 <= request["status"] < 500 for request in requests),
        "prompt_tokens": sum(request["prompt_tokens"] for request in requests),
        "completion_tokens": sum(request["completion_tokens"] for request in requests),
    }


def signals(
    section: Any, requests: list[dict[str, Any]], baseline: dict[str, Any], name: str
) -> list[dict[str, Any]]:
    enough = len(requests) >= section.minimum_requests
    errors = volume(requests)["errors"] / len(requests) if requests else None
    answered = [request for request in requests if request["status"] < 400]
    total = [request["total_s"] for request in answered]
    first = [request["first_token_s"] for request in answered if request["first_token_s"] is not None]
    found = [_signal("error rate", errors, baseline["errors"] / baseline["requests"], section.error_rate)]
    for label, values, before in (
        ("answer, p50", total, baseline["latency"]["p50"]),
        ("answer, p95", total, baseline["latency"]["p95"]),
        ("answer, p99", total, baseline["latency"]["p99"]),
        ("first token, p95", first, baseline["first_token"]["p95"]),
    ):
        value = statistics.percentiles(values)[label[-3:]] if values else None
        # Only the 95th percentile judges: the median hides a slow tail, the 99th is noise on short logs.
        limit = before * section.latency_ratio if label.endswith("p95") else None
        found.append(_signal(f"{label} (s)", value, before, limit))
    for signal in found:
        if signal["ok"] is not None and not enough:
            signal["ok"], signal["action"] = None, f"wait for {section.minimum_requests} requests"
        elif signal["ok"] is False:
            signal["action"] = f"look at the log; to go back: luthier rollback {name}"
    return found


def _signal(name: str, value: float | None, baseline: float, limit: float | None) -> dict[str, Any]:
    return {
        "signal": name,
        "ok": None if value is None or limit is None else value <= limit,
        "value": None if value is None else round(value, 4),
        "baseline": round(baseline, 4),
        "limit": None if limit is None else round(limit, 4),
        "action": None,
    }
