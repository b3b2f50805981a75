from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier.gates import Evidence
from luthier.gates.parity import Params, _rounding, check
from luthier.inference.generate import Runtime
from luthier.inference.sampling import Sampling
from tests.gates.evidence import evidence
from tests.inference.test_generate import make_adapter
from tests.tiny import make_tiny_base

STOP = frozenset({2})
PROBES = [[1, 5 + n, 60, 7, 88 - n, 9] for n in range(8)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def candidate(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    root = tmp_path_factory.mktemp(request.param)
    base = make_tiny_base(root / "base", dtype=request.param)
    adapter = make_adapter(base, root / "adapter", seed=4)
    runtime = Runtime.load(base)
    runtime.add("aaaa", adapter)
    return evidence(
        adapter=adapter, base=base, probes=PROBES, stop_ids=STOP, max_new_tokens=12,
        serve=lambda prompt: list(runtime.stream(prompt, Sampling(12), "aaaa", STOP)),
    )  # fmt: skip


def changed(candidate: Evidence, **changes: object) -> Evidence:
    return replace(candidate, **changes)  # type: ignore[arg-type]


def test_the_serving_engine_says_what_a_stranger_gets(candidate: Evidence) -> None:
    verdict = check(Params(rows=8), candidate)
    assert verdict.passed, verdict
    assert verdict.evidence == {"probes": 8, "excused": [], "differing": []}


def test_another_adapter_than_the_saved_one_is_found_out(candidate: Evidence, tmp_path: Path) -> None:
    runtime = Runtime.load(candidate.base)
    other = make_adapter(candidate.base, tmp_path / "other", seed=5)
    runtime.add("bbbb", other)
    served = changed(candidate, serve=lambda prompt: list(runtime.stream(prompt, Sampling(12), "bbbb", STOP)))
    verdict = check(Params(rows=8), served)
    assert not verdict.passed and "differ from plain transformers" in verdict.reason
    assert verdict.evidence["differing"][0]["served"] != verdict.evidence["differing"][0]["stranger"]


@pytest.mark.parametrize("cut", [lambda said: said[:-1], lambda said: [*said, 7]], ids=["shorter", "longer"])
def test_an_answer_of_another_length_is_a_difference(candidate: Evidence, cut: object) -> None:
    served = changed(candidate, serve=lambda prompt: cut(candidate.serve(prompt)))  # type: ignore[operator]
    assert not check(Params(rows=4), served).passed


def test_nothing_to_ask_is_missing_evidence(candidate: Evidence) -> None:
    assert not check(Params(), changed(candidate, probes=[])).passed


def test_only_a_choice_within_the_strangers_own_rounding_is_excused() -> None:
    true_V = torch.tensor([3.0, 2.9, 2.5, -1.0])
    rounded_V = true_V + torch.tensor([-0.06, 0.06, 0.0, 0.0])  # its two best change places
    assert _rounding(true_V, rounded_V, 1)["within"]
    assert not _rounding(true_V, rounded_V, 2)["within"]
    assert not _rounding(true_V, true_V, 1)["within"]


@pytest.mark.parametrize("place", [1, 20], ids=["the second best", "a token far down"])
def test_a_token_that_rounding_cannot_explain_is_a_difference(candidate: Evidence, place: int) -> None:
    """Where the first token's choice is clear, no other one is excused, in no number type."""
    clear = [probe for probe in PROBES if _gap(candidate, probe) > 0.5]
    assert clear
    wrong = _ranked(candidate, clear[0])[place]
    served = changed(candidate, probes=clear[:1], serve=lambda prompt: [wrong, *candidate.serve(prompt)[1:]])
    assert not check(Params(rows=1), served).passed


def _first_logits(candidate: Evidence, probe: list[int]) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(candidate.base, dtype=torch.float32)
    with torch.inference_mode():
        tuned = PeftModel.from_pretrained(base, candidate.adapter)
        found: torch.Tensor = tuned(input_ids=torch.tensor([probe])).logits[0, -1]
    return found


def _gap(candidate: Evidence, probe: list[int]) -> float:
    best = _first_logits(candidate, probe).topk(2).values
    return float(best[0] - best[1])


def _ranked(candidate: Evidence, probe: list[int]) -> list[int]:
    order: list[int] = _first_logits(candidate, probe).argsort(descending=True).tolist()
    return order


def test_a_stranger_needs_nothing_of_the_engine() -> None:
    code = (
        "import sys, luthier.gates.parity\n"
        "assert not {m for m in sys.modules if m.startswith(('luthier.engine', 'torch', 'transformers'))}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
