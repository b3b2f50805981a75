from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier import artifacts
from luthier.stages import Inputs, monitor
from luthier.store import RequestRecord
from tests.stages.judging import monitor_section

BASELINE = {
    "requests": 50, "errors": 0, "latency": {"p50": 0.2, "p95": 0.4, "p99": 0.5},
    "first_token": {"p50": 0.1, "p95": 0.2, "p99": 0.25},
}  # fmt: skip


def request(total_s: float = 0.2, status: int = 200, first_s: float | None = 0.1) -> dict[str, Any]:
    return asdict(
        RequestRecord("2026-01-01T00:00:00+00:00", "d", "toy@production", status, 40, 3, first_s, total_s)
    )


def watched(requests: list[dict[str, Any]], **settings: Any) -> dict[str, dict[str, Any]]:
    found = monitor.signals(monitor_section(**settings), requests, BASELINE, "toy")
    return {signal["signal"]: signal for signal in found}


def test_traffic_like_the_baseline_breaches_nothing() -> None:
    found = watched([request() for _ in range(50)])
    assert all(signal["ok"] is not False and signal["action"] is None for signal in found.values())
    assert (
        found["answer, p95 (s)"]["ok"] and found["error rate"]["ok"] and found["first token, p95 (s)"]["ok"]
    )


def test_a_slow_tail_breaches_and_names_the_way_back() -> None:
    found = watched([request(0.2 if n % 10 else 2.0) for n in range(50)])
    assert found["answer, p95 (s)"]["ok"] is False
    assert "luthier rollback toy" in found["answer, p95 (s)"]["action"]
    assert found["first token, p95 (s)"]["ok"] is True


def test_errors_of_the_server_breach_and_refusals_of_bad_requests_do_not() -> None:
    assert (
        watched([request(status=500 if n % 20 == 0 else 200) for n in range(60)])["error rate"]["ok"] is False
    )
    assert watched([request(status=400 if n % 2 else 200) for n in range(60)])["error rate"]["ok"] is True


def test_too_few_requests_give_no_verdict_however_bad() -> None:
    found = watched([request(9.0, 500) for _ in range(19)])
    assert all(signal["ok"] is None for signal in found.values())
    assert found["error rate"]["action"] == "wait for 20 requests"


def test_no_request_at_all_gives_no_verdict() -> None:
    assert all(signal["ok"] is None for signal in watched([]).values())


RECORDS = st.lists(
    st.builds(
        request,
        st.floats(0, 10),
        st.sampled_from([200, 200, 200, 400, 404, 429, 500, 503]),
        st.none() | st.floats(0, 5),
    ),
    max_size=60,
)


@given(RECORDS)
def test_the_counters_are_those_of_a_replay_of_the_log(requests: list[dict[str, Any]]) -> None:
    replay: Counter[str] = Counter()
    for one in requests:
        replay["requests"] += 1
        replay["errors"] += one["status"] >= 500
        replay["refused"] += 400 <= one["status"] < 500
        replay["prompt_tokens"] += one["prompt_tokens"]
        replay["completion_tokens"] += one["completion_tokens"]
    counted = monitor.volume(requests)
    assert counted == {name: replay[name] for name in counted}


@given(RECORDS)
def test_every_signal_is_stated_and_a_breach_always_names_an_action(requests: list[dict[str, Any]]) -> None:
    found = watched(requests)
    assert len(found) == 5
    for signal in found.values():
        assert signal["ok"] is not False or signal["action"]
        assert signal["ok"] is None or signal["limit"] is not None


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    evaluated, log = tmp_path / "evaluate", tmp_path / "log"
    (evaluated / "observed").mkdir(parents=True)
    log.mkdir()
    artifacts.write_json(evaluated / "observed" / "efficiency.json", BASELINE)
    draw = random.Random(1)
    artifacts.write_jsonl(log / "requests.jsonl", [request(draw.uniform(0.1, 0.3)) for _ in range(30)])
    return Inputs("toy", {"evaluate": evaluated, "requests": log}, {}, tmp_path, tmp_path, tmp_path, 1)


def test_the_report_of_a_log_holds_volume_and_signals(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    facts = monitor.run(monitor_section(), inputs, out)
    assert artifacts.read_json(out / "observed" / "report.json") == facts
    assert facts["volume"]["requests"] == 30 and facts["volume"]["prompt_tokens"] == 1200


def test_the_digest_of_a_report_does_not_hang_on_the_traffic(inputs: Inputs, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        out = tmp_path / name
        out.mkdir()
        monitor.run(monitor_section(), inputs, out)
        digests.add(artifacts.seal(out))
        (inputs.artefacts["requests"] / "requests.jsonl").unlink()
        artifacts.write_jsonl(inputs.artefacts["requests"] / "requests.jsonl", [request(3.0)])
    assert len(digests) == 1
