"""The GPU benchmark's code path, on a CPU with a tiny shape: its systems train the same."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def test_the_systems_of_the_gpu_benchmark_lose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCH, BENCH / "systems"):
        monkeypatch.syspath_prepend(str(folder))
    import gpu_run

    found = {}
    for system in ("luthier", "peft", "peft-checkpointed"):
        job = gpu_run.Job(system, "cpu", "tiny", length=48, at_once=2, micros=2, steps=3, warmup=1)
        found[system] = gpu_run.run(job)["workloads"]
        assert all("failed" not in one for one in found[system].values())
    for workload in gpu_run.WORKLOADS:
        ours = found["luthier"][workload]
        assert ours["tokens_per_s"] > 0 and len(ours["losses"]) == 3
        for theirs in (found["peft"][workload], found["peft-checkpointed"][workload]):
            assert ours["tokens"] == theirs["tokens"]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=2e-3)
