"""The examples really run: the guard recipe on the real rows and the real base, cut short."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.world import LUTHIER, environment

GUARD = Path(__file__).parents[2] / "examples" / "guard.yaml"
CUT = (
    "train.0.steps=2", "train.0.validation.rows=16", "evaluate.rows=40", "evaluate.latency_requests=3",
    "evaluate.baselines=[{name: tfidf}]", "release.gates=[{name: parity, rows: 2}]",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_guard_recipe_runs_cut_short_on_real_rows_and_the_real_base(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 3e9:
        pytest.skip("less than 3 GB of disk are free")
    words = [word for override in CUT for word in ("--set", override)]
    done = subprocess.run(
        [*LUTHIER, "run", str(GUARD), *words, "--json"],
        env=environment(tmp_path) | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if "error" in said and said["error"]["kind"] == "FetchError":
        pytest.skip(f"the package index cannot be reached: {said['error']['what']}")
    assert done.returncode == 0, done.stderr[-3000:]
    facts = said["stages"]["data"]["facts"]
    assert facts["rows"]["train"] > 11_000 and facts["rows"]["test"] == 2_101
    assert said["stages"]["evaluate"]["facts"]["rows"] == 40
    assert said["stages"]["evaluate"]["facts"]["systems"]["tfidf"]["accuracy"] > 0.8
    verdicts = {
        verdict["gate"]: verdict["passed"] for verdict in said["stages"]["release"]["facts"]["verdicts"]
    }
    assert verdicts == {"compatibility": True, "parity": True, "model card": True}
