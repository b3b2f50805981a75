"""Who reads in a step, in which order, and how the step's tokens lie.

Source: chunked prefill (Sarathi-Serve, Agrawal et al. 2024, arXiv 2403.02310), with the shortest prompts
first, so that none waits for a long one, and half of every chunk for the oldest, so that the long one ends
too. It knows numbers and sequences, not models or which blocks are free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.inference.decode import Laid, Reach, Segment
from luthier.inference.growing import Growing
from luthier.inference.pages import BLOCK


def readers(running: Sequence[Growing], budget: int) -> list[tuple[Growing, int]]:
    """Who reads, the shortest first, with how many tokens of the budget each has to leave for the oldest."""
    reading = [row for row in running if row.left > 1]
    if not reading:
        return []
    oldest, *rest = reading
    kept = min(oldest.left, -(-budget // 2))
    return [*((row, kept) for row in sorted(rest, key=lambda row: row.left)), (oldest, 0)]


def lay(some: Sequence[tuple[Growing, int, int]]) -> tuple[Tensor, Laid]:
    """Tokens end to end, and where each lies, under what, and what it sees; of (sequence, tokens, slot)."""
    ids: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    segments: list[Segment] = []
    for row, count, slot in some:
        start = len(ids)
        span = range(row.read, row.read + count)
        ids += row.ids[row.read : row.read + count]
        positions += span
        places += [row.blocks[place // BLOCK] * BLOCK + place % BLOCK for place in span]
        if segments and segments[-1].slot == slot:
            start = segments.pop().start
        segments.append(Segment(slot, start, len(ids)))
    width = max(len(row.blocks) for row, _, _ in some)
    table = [row.blocks + [0] * (width - len(row.blocks)) for row, _, _ in some]
    counts = torch.tensor([count for _, count, _ in some])
    positions_T = torch.tensor(positions)
    reach = Reach(
        table_S_N=torch.tensor(table, dtype=torch.int32),
        lines_T=torch.repeat_interleave(torch.arange(len(some)), counts), lengths_T=positions_T + 1,
    )  # fmt: skip
    runs = torch.tensor([segment.stop - segment.start for segment in segments])
    slots_T = torch.repeat_interleave(torch.tensor([segment.slot for segment in segments]), runs)
    return torch.tensor(ids), Laid(positions_T, torch.tensor(places), slots_T, tuple(segments), reach)
