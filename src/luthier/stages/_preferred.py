"""Evaluation on pairs: how often base and tuned find the chosen answer likelier than the rejected one.

Sources: ranking accuracy (Chen et al. 2024, "Preference Learning Algorithms Do Not Learn Preference
Rankings", arXiv 2405.19534), which the untouched base has too, so that
both can be compared row by row; and for the tuned model the implicit reward's margin and how often it is
above 0 (Rafailov et al. 2023, arXiv 2305.18290), without beta, in nats. Intervals are Wilson's, the
comparison is exact and paired. Loss is that of the chosen answers' tokens. It does not know gates, nor who
preferred what.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from luthier import statistics, template
from luthier.inference.generate import Runtime
from luthier.inference.score import row_logps
from luthier.rows import Pair

TUNED = "tuned"
NOTES = {
    "base": "share of pairs whose chosen answer the untouched base finds likelier",
    TUNED: "the same under the trained adapter",
}
SIDES = ("chosen", "rejected")
Progress = Callable[[str], Callable[[int, int], None]]


def judge(
    runtime: Runtime, tokenizer: Any, pairs: Sequence[Pair], told: Progress
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What scorecard and samples hold of these pairs."""
    documents = [document for row in template.encode_rows(tokenizer, pairs) for document in row]
    rows = [(document.ids, document.mask) for document in documents]
    said = {
        name: row_logps(runtime, rows, adapter, told(f"pairs, {name}"))
        for name, adapter in (("base", None), (TUNED, TUNED))
    }
    ahead = {
        name: [a - b for a, b in zip(found[::2], found[1::2], strict=True)] for name, found in said.items()
    }
    margins = [a - b for a, b in zip(ahead[TUNED], ahead["base"], strict=True)]
    systems = {name: _system(found) | {"note": NOTES[name]} for name, found in ahead.items()}
    won = sum(margin > 0 for margin in margins)
    low, high = statistics.wilson(won, len(margins))
    systems[TUNED] |= {
        "margin": sum(margins) / len(margins), "preferred": won / len(margins),
        "preferred_low": low, "preferred_high": high,
    }  # fmt: skip
    right = {name: [gap > 0 for gap in found] for name, found in ahead.items()}
    wins = sum(a and not b for a, b in zip(right[TUNED], right["base"], strict=True))
    losses = sum(b and not a for a, b in zip(right[TUNED], right["base"], strict=True))
    tokens = sum(sum(document.mask[1:]) for document in documents[::2])
    loss = {name: -sum(found[::2]) / tokens for name, found in said.items()}
    card = {
        "measure": "preference",
        "rows": len(pairs),
        "systems": systems,
        "paired": {
            f"{TUNED}_vs_base": {"wins": wins, "losses": losses, "p": statistics.mcnemar(wins, losses)}
        },
        "loss": loss,
        "perplexity": {name: math.exp(nats) if nats < 700 else None for name, nats in loss.items()},
    }
    return card, [_sample(pair, n, right, margins[n]) for n, pair in enumerate(pairs)]


def _system(ahead: Sequence[float]) -> dict[str, Any]:
    right = sum(gap > 0 for gap in ahead)
    low, high = statistics.wilson(right, len(ahead))
    unmeasured = dict.fromkeys(("f1", "precision", "recall", "kappa"))
    return {
        "accuracy": right / len(ahead), "low": low, "high": high, **unmeasured,
        "confusion": {}, "unparsed": 0,
    }  # fmt: skip


def _sample(pair: Pair, n: int, right: dict[str, list[bool]], margin: float) -> dict[str, Any]:
    said = {name: SIDES[not found[n]] for name, found in right.items()}
    return {
        "id": pair.id,
        "where": pair.where,
        "gold": SIDES[0],
        "prompt": pair.prompt[-1].content,
        "answers": said,
        "said": said,
        "correct": {name: found[n] for name, found in right.items()},
        "margin": margin,
    }
