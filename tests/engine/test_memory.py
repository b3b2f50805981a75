"""Bytes by kind come from shapes, and peaks from the kernel."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from luthier.engine import base, host, memory
from tests.engine.tiny_families import FAMILIES

SHAPE = memory.Shape(2, 64, 4, 2, 16, 128, 300, 100_000, 2)


def test_a_shape_is_read_from_any_family() -> None:
    for make in FAMILIES.values():
        shape = memory.Shape.of(make(), 10, 2)
        assert (shape.layers, shape.width, shape.inner, shape.kv_heads, shape.vocabulary) == (
            2,
            32,
            48,
            2,
            97,
        )


def test_a_forecast_is_the_sum_of_its_kinds() -> None:
    found = memory.forecast(SHAPE, 1000, (256, 100), 64)
    assert found.total == sum(asdict(found).values()) == found.as_dict()["total"]
    assert found.weights == 200_000 and found.adapters == 4000 and found.optimiser == 8000


@given(tokens=st.integers(1, 10_000), more=st.integers(1, 1000), trainable=st.integers(1, 10**7))
def test_more_tokens_layers_or_weights_never_take_less(tokens: int, more: int, trainable: int) -> None:
    least = memory.forecast(SHAPE, trainable, (tokens, 8), 64).total
    assert memory.forecast(SHAPE, trainable, (tokens + more, 8), 64).total > least
    assert memory.forecast(SHAPE, trainable + more, (tokens, 8), 64).total > least
    assert memory.forecast(replace(SHAPE, layers=3), trainable, (tokens, 8), 64).total > least


def test_an_outline_has_the_shapes_of_the_model_and_none_of_its_bytes(tiny_base: Path) -> None:
    outline, model = base.outline(tiny_base), base.load(tiny_base, "float32")
    assert all(weight.is_meta for weight in outline.parameters())
    assert {n: w.shape for n, w in outline.named_parameters()} == {
        n: w.shape for n, w in model.named_parameters()
    }


def test_the_peak_is_at_least_what_is_resident() -> None:
    memory.forget_peak()
    block = bytearray(50_000_000)
    block[::4096] = b"x" * len(block[::4096])
    peak = memory.peak_rss_bytes()
    del block
    assert peak >= 50_000_000 and memory.rss_bytes() > 0 and memory.peak_rss_bytes() >= memory.rss_bytes()


def test_the_host_probe_is_quick_and_complete() -> None:
    found = host.probe(0.1)
    assert found.cores >= 1 and 0 < found.memory_free_bytes <= found.memory_total_bytes
    assert min(found.bf16_flops, found.fp32_flops, found.read_bytes_s) > 0
    assert set(found.as_dict()) >= {"cores", "flags", "native_bf16"}
