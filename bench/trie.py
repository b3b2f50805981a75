"""What sharing prefixes saves: tokens computed and seconds a step, against computing every row in full.

A random Llama (no weights are loaded) with fused LoRA layers trains on rows that begin alike for 0, 30 and
70 % of their tokens, eight rows to a prefix; both ways alternate; the median counts. Prints one JSON object.

    python bench/trie.py [--threads 2] [--rounds 5]

It does not know real data, memory or other machines.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier.engine import batch, fused, head, trie
from luthier.engine.attention import IMPLEMENTATION
from luthier.engine.native import kernels
from luthier.methods import lora
from luthier.objectives import Batch
from luthier.template import Encoded

ROWS, TOKENS, FAMILY, ANSWER, BUDGET, SEED = 32, 256, 8, 32, 2048, 7
SHARES = (0.0, 0.3, 0.7)
CONFIG: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048,
}  # fmt: skip


def workload(share: float) -> list[Encoded]:
    """Rows of equal length; each family of them has its own prefix, and the last tokens are learnt."""
    draw = random.Random(SEED)
    prefix = round(share * TOKENS)

    def text(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1, CONFIG["vocab_size"]) for _ in range(length))

    heads = [text(prefix) for _ in range(ROWS // FAMILY)]
    mask = tuple(at >= TOKENS - ANSWER for at in range(TOKENS))
    return [Encoded(heads[n % len(heads)] + text(TOKENS - prefix), mask, str(n)) for n in range(ROWS)]


def flat(rows: Sequence[Encoded]) -> tuple[Batch, ...]:
    packed = batch.pack([len(row.ids) for row in rows], BUDGET)
    return tuple(batch.collate([rows[row] for row in members], block=0) for members in packed)


def step(model: Any, micros: Sequence[Batch]) -> float:
    """Seconds of the gradients of one step."""
    began = time.perf_counter()
    for micro in micros:
        (-head.batch_logps(model, micro).sum()).backward()
    seconds = time.perf_counter() - began
    model.zero_grad(set_to_none=True)
    return seconds


def measure(model: Any, share: float, rounds: int) -> dict[str, Any]:
    rows = workload(share)
    ways = {"flat": flat(rows), "shared": batch.micro_batches(rows, BUDGET)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, micros in ways.items():
            took = step(model, micros)
            if number:  # the first round warms up
                seconds[name].append(took)
    found = {
        name: {
            "tokens": sum(len(micro.ids_T) for micro in micros), "micro_batches": len(micros),
            "seconds": [round(value, 4) for value in seconds[name]],
            "median_s": round(statistics.median(seconds[name]), 4),
        }
        for name, micros in ways.items()
    }  # fmt: skip
    return {
        "prefix_share": share, **found,
        "tokens_ratio": round(found["shared"]["tokens"] / found["flat"]["tokens"], 4),
        "speedup": round(found["flat"]["median_s"] / found["shared"]["median_s"], 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), attn_implementation=IMPLEMENTATION)
    model = lora.attach(model.float(), lora.Params(), seed=SEED)
    fused.fuse(model, kernels(compiled=False))
    model.train()
    about = {"rows": ROWS, "tokens_per_row": TOKENS, "rows_per_prefix": FAMILY, "block": trie.BLOCK}
    print(
        json.dumps(
            {
                **about, "budget": BUDGET, "config": CONFIG, "threads": asked.threads, "seed": SEED,
                "torch": torch.__version__, "machine": platform.machine(),
                "results": [measure(model, share, asked.rounds) for share in SHARES],
            },
            indent=2,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
