"""Peaks are read from the kernel, and a model can be outlined without its bytes."""

from __future__ import annotations

from pathlib import Path

from luthier.engine import base, memory


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
