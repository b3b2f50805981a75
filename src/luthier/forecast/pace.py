"""How long training will take: from operations before it starts, from its own pace once it runs.

A micro-batch takes a fixed time (calls, one for each of many small operations) and a time for each operation;
both are fitted to a few real micro-batches by least squares, and neither is below zero. For a machine that is
not here: the longest of arithmetic, traffic and launches, each at an assumed share of the data sheet's rate
(`luthier.devices`).

It does not know what else will run on the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from luthier.devices import BANDWIDTH_SHARE, COMPUTE_SHARE, LAUNCH_S, Device
from luthier.forecast.flops import Flops
from luthier.forecast.footprint import Shape, layer_bytes, weights_bytes
from luthier.forecast.layout import Layout

WINDOW = 20  # finished steps that the time left is judged by
LAUNCHES_A_LAYER = 110  # kernels of one layer, forward and back, with adapters on every product
PASSES = 4  # how often what is kept of a layer is written or read in all


@dataclass(frozen=True)
class Pace:
    call_s: float
    operation_s: float

    def seconds(self, operations: Iterable[float]) -> float:
        return sum(self.call_s + self.operation_s * count for count in operations)


def fit(timed: Sequence[tuple[float, float]]) -> Pace:
    """From (operations, seconds) of some micro-batches."""
    count = len(timed)
    xs, ys = [x for x, _ in timed], [y for _, y in timed]
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in timed) / spread if spread else 0.0
    call = mean_y - slope * mean_x
    if slope <= 0 or call < 0:  # noise: all of it in proportion to the work
        return Pace(0.0, mean_y / mean_x)
    return Pace(call, slope)


def left_s(timed: Sequence[tuple[int, float]], tokens: int) -> float:
    """The time that `tokens` more will take, at the pace of the last steps: (tokens, seconds) each."""
    # The first step makes what all others use again; it says little about them.
    recent = (timed[1:] or timed)[-WINDOW:]
    done = sum(count for count, _ in recent)
    return tokens * sum(seconds for _, seconds in recent) / done if done else 0.0


def elsewhere_s(device: Device, shape: Shape, at: Layout, work: Flops) -> float:
    """One micro-batch on a device of the table."""
    moved = PASSES * shape.layers * layer_bytes(shape, at) + 2 * weights_bytes(shape)
    return max(
        work.useful / (COMPUTE_SHARE * device.flops),
        moved / (BANDWIDTH_SHARE * device.bandwidth),
        shape.layers * LAUNCHES_A_LAYER * LAUNCH_S,
    )
