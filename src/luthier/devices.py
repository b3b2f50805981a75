"""Accelerators that a plan can be made for without having one: what each can do, by name.

Sources: the vendors' data sheets (NVIDIA: H100, H200, HGX B200, A100, A10, L40S, L4, T4, RTX A6000, and the
Ampere, Ada and Blackwell GPU architecture papers for RTX 3090, 4090 and 5090; AMD: Instinct MI300X). Matrix
rates are dense, 16 bit in with float32 sums; memory is as the product is named, in 10⁹ bytes, which is less
than it has; watts are the board's limit, not what it draws.

`COMPUTE_SHARE` is assumed for all of them: the share of the matrix rate that LoRA training reaches, counted
on useful work. Its anchor is one public figure (NeMo AutoModel, Llama-3-8B, LoRA, 4,096-token rows, one
H100: 12,473 tokens/s, 41 %). Other devices, kernels and models may be far from it: no other was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE_SHARE = 0.41
BANDWIDTH_SHARE = 0.7
LAUNCH_S = 6e-6  # from one kernel to the next when each has next to nothing to do


@dataclass(frozen=True)
class Device:
    name: str
    flops: float  # per second, dense, 16 bit
    memory_bytes: float
    bandwidth: float  # bytes per second
    watts: float
    bf16: bool = True


_TABLE = (
    Device("b200", 2250e12, 180e9, 8.0e12, 1000),
    Device("h200", 989e12, 141e9, 4.8e12, 700),
    Device("h100-sxm", 989e12, 80e9, 3.35e12, 700),
    Device("h100-pcie", 756e12, 80e9, 2.0e12, 350),
    Device("mi300x", 1307e12, 192e9, 5.3e12, 750),
    Device("a100-80", 312e12, 80e9, 2.039e12, 400),
    Device("a100-40", 312e12, 40e9, 1.555e12, 400),
    Device("l40s", 362e12, 48e9, 0.864e12, 350),
    Device("l4", 121e12, 24e9, 0.3e12, 72),
    Device("a10", 125e12, 24e9, 0.6e12, 150),
    Device("a6000", 155e12, 48e9, 0.768e12, 300),
    Device("t4", 65e12, 16e9, 0.32e12, 70, bf16=False),
    Device("rtx-5090", 209e12, 32e9, 1.792e12, 575),
    Device("rtx-4090", 165e12, 24e9, 1.008e12, 450),
    Device("rtx-3090", 71e12, 24e9, 0.936e12, 350),
)
DEVICES = {device.name: device for device in _TABLE}
