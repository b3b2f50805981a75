"""Two processes that train together do what one does, and what they save belongs to nobody in particular."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from luthier.engine.placement import Placement
from tests.engine import ranks

SHARED = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lambda **how: _alone(tmp_path_factory.mktemp("alone"), tiny_base, **how)


def _alone(folder: Path, tiny: Path, **how: Any) -> tuple[Path, dict[str, Any]]:
    torch.set_num_threads(1)
    return folder / "end.safetensors", ranks.descend(Placement(), folder, tiny, **how)


def together(kind: str, folder: Path, tiny: Path, **how: Any) -> tuple[Path, dict[str, Any]]:
    one, two = ranks.gang(2, kind, folder, ranks.descending, tiny, how)
    assert one["trace"] == two["trace"] and one["look"] == two["look"]
    return folder / "end.safetensors", one


def close(one: tuple[Path, dict[str, Any]], other: tuple[Path, dict[str, Any]], rounding: float) -> None:
    for mine, yours in zip(one[1]["trace"], other[1]["trace"], strict=True):
        assert mine == pytest.approx(yours, rel=rounding)
    assert one[1]["look"] == pytest.approx(other[1]["look"], rel=rounding)
    ends = load_file(one[0]), load_file(other[0])
    assert ends[0].keys() == ends[1].keys()
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=100 * rounding, atol=100 * rounding)


@given(tokens=st.lists(st.integers(1, 4096), max_size=40), world=st.integers(1, 9))
def test_every_micro_batch_has_one_rank_and_no_rank_much_more_than_another(
    tokens: list[int], world: int
) -> None:
    shares = [Placement("ddp", rank, world).share(tokens) for rank in range(world)]
    assert sorted(number for share in shares for number, _ in share) == list(range(len(tokens)))
    assert all(weight == 1.0 for share in shares for _, weight in share)
    assert all(one < two for share in shares for (one, _), (two, _) in pairwise(share))
    loads = [sum(tokens[number] for number, _ in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)


@given(tokens=st.lists(st.integers(1, 4096), max_size=40), world=st.integers(1, 9))
def test_in_step_all_ranks_do_equally_many_and_what_is_done_again_counts_nothing(
    tokens: list[int], world: int
) -> None:
    shares = [Placement("fsdp", rank, world).share(tokens) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [0.0] * len(tokens)
    for number, weight in (turn for share in shares for turn in share):
        counted[number] += weight
    assert counted == [1.0] * len(tokens)


@pytest.mark.parametrize("kind", SHARED)
def test_two_processes_descend_as_one_does_with_dropout_too(
    kind: str, tiny_base: Path, alone: Any, tmp_path: Path
) -> None:
    close(together(kind, tmp_path, tiny_base, dropout=0.1), alone(dropout=0.1), 1e-6)


@pytest.mark.parametrize("kind", SHARED)
def test_a_rank_without_a_micro_batch_of_its_own_keeps_the_others_company(
    kind: str, tiny_base: Path, alone: Any, tmp_path: Path
) -> None:
    close(together(kind, tmp_path, tiny_base, micro_tokens=1000), alone(micro_tokens=1000), 1e-6)


@pytest.mark.parametrize("kind", SHARED)
def test_what_two_ranks_saved_goes_on_in_one_and_back(
    kind: str, tiny_base: Path, alone: Any, tmp_path: Path
) -> None:
    expected = alone()
    two, first = together(kind, tmp_path / "two", tiny_base, steps=2)
    one, second = alone(start=two, past=2, steps=4)
    end, third = together(kind, tmp_path / "again", tiny_base, start=one, past=4)
    trace = first["trace"] + [list(step) for step in second["trace"]] + third["trace"]
    close((end, {**third, "trace": trace}), expected, 1e-6)


def test_sharded_each_rank_holds_half_of_weights_and_moments(
    tiny_base: Path, alone: Any, tmp_path: Path
) -> None:
    whole = alone(steps=1)[1]["held"]
    ranked = ranks.gang(2, "fsdp", tmp_path, ranks.descending, tiny_base, {"steps": 1})
    for rank in ranked:
        assert rank["held"] == pytest.approx(whole / 2, rel=0.02)


def test_a_bf16_base_is_sharded_beside_float32_adapters(tiny_base: Path, alone: Any, tmp_path: Path) -> None:
    close(together("fsdp", tmp_path, tiny_base, dtype="bfloat16"), alone(dtype="bfloat16"), 2e-3)


def test_a_gradient_that_one_rank_has_is_everyones_and_one_that_nobody_has_stays_none(tmp_path: Path) -> None:
    for found in ranks.gang(2, "ddp", tmp_path, ranks.sums_that_miss):
        assert found == [[3.0] * 3, [5.0] * 3, None]


@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("what", ["sick", "asked"])
def test_what_one_rank_meets_stops_the_step_of_all(
    kind: str, what: str, tiny_base: Path, tmp_path: Path
) -> None:
    one, two = ranks.gang(2, kind, tmp_path, ranks.poisoned, tiny_base, what)
    assert one == two and one[1] is True
    assert one[0].startswith("Sick: rows" if what == "sick" else "Asked")
    if what == "sick":
        assert "the loss of step 2 is nan" in one[0] and ranks.loader()(2)[1].rows[0] in one[0]
