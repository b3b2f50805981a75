"""Times before the first step come from a few micro-batches, after it from the steps themselves."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.devices import DEVICES
from luthier.forecast import flops, footprint, layout, pace
from luthier.methods import lora
from luthier.template import Encoded
from tests.forecast.test_published_arithmetic import LLAMA_3_8B


def test_a_fixed_time_and_a_rate_are_told_apart() -> None:
    found = pace.fit([(1e9, 1.1), (2e9, 2.1), (5e9, 5.1)])
    assert found.call_s == pytest.approx(0.1) and found.operation_s == pytest.approx(1e-9)
    assert found.seconds([1e9, 3e9]) == pytest.approx(4.2)


@pytest.mark.parametrize("timed", [[(1e9, 2.0)], [(1e9, 3.0), (2e9, 1.0)], [(1e9, 1.0), (2e9, 4.0)]])
def test_times_that_make_no_sense_become_a_plain_rate(timed: list[tuple[float, float]]) -> None:
    found = pace.fit(timed)
    assert found.call_s == 0 and found.operation_s > 0
    assert found.seconds([count for count, _ in timed]) == pytest.approx(sum(s for _, s in timed))


def test_the_time_left_is_that_of_the_tokens_left() -> None:
    timed = [(100, 9.0), *[(100, 1.0)] * 10, *[(50, 0.5)] * 10]
    assert pace.left_s(timed, 1000) == pytest.approx(10.0)
    assert pace.left_s(timed[:1], 1000) == pytest.approx(90.0) and pace.left_s([], 1000) == 0


def test_the_one_public_anchor_is_met_within_a_tenth() -> None:
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(LLAMA_3_8B)
    shape = footprint.shape(outline, lora.ranks(outline, lora.Params(r=8)), 2)
    row = Encoded(tuple(range(4096)), (True,) * 4096, "row")
    at = layout.of([row, Encoded(row.ids[::-1], row.mask, "other")])
    seconds = pace.elsewhere_s(DEVICES["h100-sxm"], shape, at, flops.training(shape, at))
    assert at.tokens / seconds == pytest.approx(12_473, rel=0.1)


def test_a_device_is_bound_by_launches_where_there_is_next_to_nothing_to_do() -> None:
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(LLAMA_3_8B)
    shape = footprint.shape(outline, {}, 2)
    at = layout.of([Encoded((1, 2, 3), (False, True, True), "row")])
    times = [pace.elsewhere_s(device, shape, at, flops.training(shape, at)) for device in DEVICES.values()]
    assert min(times) >= shape.layers * pace.LAUNCHES_A_LAYER * 6e-6


def test_every_device_is_named_as_recipes_name_it() -> None:
    assert len(DEVICES) >= 14
    for name, device in DEVICES.items():
        assert name == device.name == name.lower() and min(device.flops, device.bandwidth, device.watts) > 0
        assert 8e9 <= device.memory_bytes <= 300e9
