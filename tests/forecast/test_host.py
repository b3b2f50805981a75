"""What this machine can do is measured quickly, and all of it is told."""

from __future__ import annotations

from luthier.forecast import host


def test_the_host_probe_is_quick_and_complete() -> None:
    found = host.probe(0.1)
    assert found.cores >= 1 and 0 < found.memory_free_bytes <= found.memory_total_bytes
    assert min(found.bf16_flops, found.fp32_flops, found.read_bytes_s) > 0
    assert set(found.as_dict()) >= {"cores", "flags", "native_bf16"}
