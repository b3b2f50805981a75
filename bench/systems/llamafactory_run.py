"""LLaMA-Factory's sft workflow on a benchmark job, in LLaMA-Factory's own environment.

    defaults  bf16, gradient checkpointing, padded batches
    neat      `neat_packing`: its own knapsack lays rows end to end, with a mask per row
    best      neat packing without gradient checkpointing, in the job's number type

The rows are given as the tokenised data set that its `tokenized_path` reads. Neat packing chooses rows over
the whole file, so a step has other rows than elsewhere, though about as many tokens: `cutoff_len` is the mean
tokens of a step, and at least the longest row. Its loss curve is therefore not comparable step by step.
Not known: what its own preprocessing would cost.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from llamafactory.data.processor.processor_utils import greedy_knapsack
from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp
from meter import Job, Meter
from trainer import arguments, callback, metered

IGNORED = -100
EIGHT = 8
Example = dict[str, list[int]]


def plain(rows: list[dict[str, Any]]) -> list[Example]:
    return [
        {
            "input_ids": row["input_ids"],
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": labels(row),
        }
        for row in rows
    ]


def labels(row: dict[str, Any]) -> list[int]:
    return [token if learnt else IGNORED for token, learnt in zip(row["input_ids"], row["mask"], strict=True)]


def neat(rows: list[dict[str, Any]], room: int, pad: int) -> list[Example]:
    """Packs as LLaMA-Factory's packed processor forms them: numbered rows, then padding up to `room` + 1."""
    by_length: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_length[len(row["input_ids"])].append(row)
    packs = []
    for knapsack in greedy_knapsack([len(row["input_ids"]) for row in rows], room):
        pack: Example = {"input_ids": [], "attention_mask": [], "position_ids": [], "labels": []}
        for number, length in enumerate(knapsack, 1):
            row = by_length[length].pop()
            pack["input_ids"] += row["input_ids"]
            pack["attention_mask"] += [number] * length
            pack["position_ids"] += list(range(length))
            pack["labels"] += labels(row)
        missing = room + 1 - len(pack["input_ids"])
        for name, filler in (
            ("input_ids", pad), ("attention_mask", 0), ("position_ids", 0), ("labels", IGNORED),
        ):  # fmt: skip
            pack[name] += [filler] * missing
        packs.append(pack)
    return packs


def main() -> None:
    job = Job.given()
    rows = job.read()
    meter, micro = Meter.over(job, rows), []
    torch.set_num_threads(job.threads)
    settings = arguments(job)
    if job.variant != "defaults":
        room = max(sum(meter.tokens) // len(meter.tokens), *(len(row["input_ids"]) for row in rows))
        room += -(room + 1) % EIGHT  # its collator would pad to that anyway
        examples = neat(rows, room, pad=0)
        meter.tokens = [sum(map(bool, pack["attention_mask"])) for pack in examples]
        settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "neat_packing": True}
        settings |= {"packing": True, "cutoff_len": room + 1, "max_steps": min(job.steps, len(examples))}
        settings |= {"disable_gradient_checkpointing": job.variant == "best"}
    else:
        examples = plain(rows)
    data = Path(job.scratch) / "tokens"
    DatasetDict({"train": Dataset.from_list(examples)}).save_to_disk(str(data))
    workflow.CustomSeq2SeqTrainer = metered(workflow.CustomSeq2SeqTrainer, meter, micro)
    run_exp(
        {
            **settings,
            "model_name_or_path": job.base, "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_rank": job.rank, "lora_alpha": job.alpha, "lora_target": "all", "template": "chatml",
            "dataset": "given", "tokenized_path": str(data), "overwrite_output_dir": True,
            "bf16": job.variant != "best" or job.dtype == "bfloat16",
        },
        callbacks=[callback(meter, micro)],
    )  # fmt: skip
    meter.answer(("llamafactory", "torch", "transformers", "peft", "accelerate"))


if __name__ == "__main__":
    main()
