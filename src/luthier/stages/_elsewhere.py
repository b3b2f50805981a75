"""What a training would take on a device of the table: closed forms alone, nothing of it is measured here.

Sources: the device's data sheet (`luthier.devices`), `forecast.footprint` for memory, `forecast.flops` and
`forecast.pace` for time. It does not know what such a device does beside this work.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from luthier.devices import DEVICES, Device
from luthier.engine import batch
from luthier.forecast import fit, flops, layout, pace
from luthier.forecast.footprint import Checkpointing, How
from luthier.stages import _kept

DEVICE_TOKENS = 8192  # of a micro-batch; more does not train faster
CONTEXT_BYTES = 700_000_000  # what an accelerator's driver and libraries take of its memory


@dataclass(frozen=True)
class Work:
    """What the phase will read and move, known before anything runs."""

    loader: batch.Loader
    need: fit.Work

    @property
    def steps(self) -> int:
        return len(self.need.steps)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for step in self.need.steps for row in step)


def how(device: Device | None, compiled: bool) -> How:
    if device is None:
        return How(compiled=compiled)
    return How(  # shares are assumed, not measured
        compiled=True, process_bytes=CONTEXT_BYTES, here=False, fragmentation=0.05, slack=0.02
    )  # fmt: skip


def moved(work: Work, device: Device) -> Work:
    """The same work as a device of the table would do it."""
    shape = replace(work.need.shape, mapped=False, weight_bytes=2)
    there = replace(how(device, True), sampling_bytes=work.need.how.sampling_bytes)
    return replace(work, need=replace(work.need, shape=shape, how=there, row_tokens=0))


def elsewhere(device: Device, section: Any, work: Work) -> dict[str, Any]:
    """One line of the table of devices: does it fit, at what peak, and for how long."""
    there = moved(work, device)
    chosen = fit.choose(there.need, device.memory_bytes, DEVICE_TOKENS, tuple(Checkpointing))
    if chosen is None:
        return {"device": device.name, "fits": False}
    minutes = elsewhere_s(device, section.phases[0], there, chosen) / 60
    return {
        "device": device.name, "fits": True, "checkpointing": chosen.checkpointing.value,
        "peak_gb": round(chosen.forecast.total / 1e9, 2), "minutes": round(minutes, 6),
        "energy_kwh": round(device.watts * minutes / 60e3, 9),
    }  # fmt: skip


def elsewhere_s(device: Device, phase: Any, work: Work, chosen: fit.Choice) -> float:
    """Training time on a device of the table, looks at held-out loss included."""
    shape, kind = work.need.shape, chosen.checkpointing

    def seconds(at: layout.Layout, count: flops.Flops) -> float:
        return pace.elsewhere_s(device, shape, at, count)

    training = sum(seconds(at, flops.training(shape, at, kind)) for at in chosen.layouts)
    held_out = layout.step(work.need.validation, chosen.micro_tokens)
    look = sum(seconds(at, flops.validation(shape, at)) for at in held_out)
    return training + looks(work, phase) * look


def roomy(work: Work) -> list[str]:
    """Devices of the table on which this training fits, the one with the least memory first."""
    least = fit.least(moved(work, next(iter(DEVICES.values()))).need, tuple(Checkpointing)).total
    fitting = [device for device in DEVICES.values() if least <= device.memory_bytes]
    return [device.name for device in sorted(fitting, key=lambda device: device.memory_bytes)]


def looks(work: Work, phase: Any) -> int:
    """How often held-out loss is looked at."""
    return len(_kept.looks(phase, len(work.loader.ids), work.steps)) if work.need.validation else 0
