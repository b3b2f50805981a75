"""The benchmark's rows: four workloads as tokens, so that every system trains on the very same bytes.

    python bench/workloads.py FOLDER [--base BASE] [--home HOME] [--seed 17]

    chat    prompt log-normal around 60 tokens, answer around 110, tail to 1,000
    equal   every row 512 tokens, the second half learnt: nothing to gain from packing
    prefix  70 % of all tokens are one prefix that every row begins with
    guard   the rows of examples/guard.yaml, in the base's chat template

Rows of the first three are cut from the guard's training messages, laid end to end: pinned, real text. Base
and messages come through luthier's own first stages. FOLDER gets NAME.jsonl (in training order),
NAME.heldout.jsonl and about.json. It does not know any trainer.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import luthier
from luthier import artifacts, template
from luthier.engine import batch
from luthier.home import Home
from luthier.rows import chat

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "guard.yaml"
LONGEST, EQUAL, PREFIX, HELD_OUT = 1000, 512, 280, 64
# rows written; rows of an optimiser step; steps that a timed run takes (the first ones warm up)
SIZES = {"chat": (640, 8, 10), "equal": (320, 8, 5), "prefix": (640, 8, 6), "guard": (1280, 16, 12)}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", type=Path, help="a model folder; default: the guard's, through luthier")
    parser.add_argument("--home", type=Path, help="luthier's home folder")
    parser.add_argument("--seed", type=int, default=17)
    asked = parser.parse_args()
    base, data = materials(asked.home, asked.base)
    write(asked.folder, base, data, asked.seed)


def materials(home: Path | None, base: Path | None) -> tuple[Path, Path]:
    """The base's folder and the folder of the guard's splits; a finished stage is found again, not redone."""
    outcome = luthier.run(RECIPE, home=home, until="data" if base else "model")
    place = Home.at(home)
    data = place.artifact(outcome.stage("data").digest) / "rows"
    return base or place.artifact(outcome.stage("model").digest) / "base", data


def write(folder: Path, base: Path, data: Path, seed: int) -> None:
    """All workloads and what they are."""
    tokenizer = template.load_tokenizer(base)
    told = artifacts.read_jsonl(data / "train.jsonl")
    found = {"guard": guard(tokenizer, data, seed)}
    for name, build in (("chat", chat_lengths), ("equal", equal_lengths), ("prefix", shared_prefix)):
        count = SIZES[name][0] + HELD_OUT
        rows = list(build(stream(tokenizer, told), random.Random(f"{name}:{seed}"), count))
        found[name] = [{**row, "id": f"{name}-{number}"} for number, row in enumerate(rows)]
    about: dict[str, Any] = {"base": str(base.absolute()), "seed": seed, "workloads": {}}
    about["base_sha256"] = artifacts.file_digest(base / "model.safetensors")
    for name, (count, per_step, steps) in SIZES.items():
        train, held_out = found[name][:count], found[name][count:]
        artifacts.write_jsonl(folder / f"{name}.jsonl", train)
        artifacts.write_jsonl(folder / f"{name}.heldout.jsonl", held_out)
        about["workloads"][name] = facts(train, per_step) | {
            "batch": per_step,
            "steps": steps,
            "sha256": artifacts.file_digest(folder / f"{name}.jsonl"),
        }
    artifacts.write_json(folder / "about.json", about)


def facts(rows: list[Row], per_step: int) -> dict[str, Any]:
    """How long the rows are, and how much of a padded batch of 8 would be padding."""
    lengths = [len(row["input_ids"]) for row in rows]
    eights = [lengths[at : at + 8] for at in range(0, len(lengths), 8)]
    laid = sum(len(some) * max(some) for some in eights)
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "learnt_tokens": sum(sum(row["mask"][1:]) for row in rows),
        "mean_length": round(sum(lengths) / len(lengths), 1),
        "longest": max(lengths),
        "padding_share_of_padded_batches": round(1 - sum(lengths) / laid, 3),
        "tokens_per_step": round(per_step * sum(lengths) / len(lengths)),
    }


def stream(tokenizer: Any, told: list[Row]) -> Iterator[int]:
    """Tokens of the messages, one after another, and round again when they are used up."""
    text = "\n".join(turn["content"] for row in told for turn in row["messages"] if turn["role"] == "user")
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    while True:
        yield from ids


def cut(tokens: Iterator[int], prompt: int, answer: int, before: list[int]) -> Row:
    own = [next(tokens) for _ in range(prompt + answer)]
    return {"input_ids": before + own, "mask": [0] * (len(before) + prompt) + [1] * answer}


def lengths(chance: random.Random) -> tuple[int, int]:
    """Prompt and answer of a chat: log-normal with medians 60 and 110; at most 1,000 together."""
    prompt = min(LONGEST // 2, max(8, round(chance.lognormvariate(math.log(60), 0.6))))
    answer = max(4, round(chance.lognormvariate(math.log(110), 0.8)))
    return prompt, min(answer, LONGEST - prompt)


def chat_lengths(tokens: Iterator[int], chance: random.Random, count: int) -> Iterator[Row]:
    for _ in range(count):
        yield cut(tokens, *lengths(chance), [])


def equal_lengths(tokens: Iterator[int], chance: random.Random, count: int) -> Iterator[Row]:
    del chance
    for _ in range(count):
        yield cut(tokens, EQUAL // 2, EQUAL // 2, [])


def shared_prefix(tokens: Iterator[int], chance: random.Random, count: int) -> Iterator[Row]:
    """A prefix of 280 tokens for all, then a turn of each row's own, 120 tokens in the mean."""
    before = [next(tokens) for _ in range(PREFIX)]
    for _ in range(count):
        prompt = max(4, round(chance.lognormvariate(math.log(30), 0.5)))
        answer = max(4, round(chance.lognormvariate(math.log(76), 0.4)))
        yield cut(tokens, prompt, min(answer, LONGEST - PREFIX - prompt), before)


def guard(tokenizer: Any, data: Path, seed: int) -> list[Row]:
    """The guard's rows as its run trains on them, then held-out ones from its validation split."""
    found = []
    for split, count in (("train", SIZES["guard"][0]), ("validation", HELD_OUT)):
        told = artifacts.read_jsonl(data / f"{split}.jsonl")
        some = [told[n] for n in batch.order(tuple(row["id"] for row in told), seed, 0)[:count]]
        chats = [chat(row["messages"], row["where"]) for row in some]
        found += [
            {"id": row.id, "input_ids": list(row.ids), "mask": [int(learnt) for learnt in row.mask]}
            for row in template.encode_all(tokenizer, chats)
        ]
    return found


if __name__ == "__main__":
    main()
