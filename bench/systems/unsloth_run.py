"""Unsloth's CPU backend on a benchmark job, in Unsloth's own environment.

    defaults  as FastLanguageModel and SFTTrainer come: bf16 weights, Unsloth's gradient checkpointing
    compile   with Unsloth's compilation of model and trainer switched on

Unsloth patches transformers and TRL when imported, so it comes first. Not known: CUDA, 4 bit.
"""

from __future__ import annotations

import os
from pathlib import Path

from meter import Job, Meter

job = Job.given()
os.environ.setdefault("UNSLOTH_ALLOW_CPU", "1")
if job.variant == "compile":
    os.environ["UNSLOTH_COMPILE_DISABLE"] = "0"

import unsloth  # noqa: E402  # isort: skip
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from trainer import arguments, callback, metered  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

LONGEST = 1024
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    rows = job.read()
    meter, micro = Meter.over(job, rows), []
    torch.set_num_threads(job.threads)
    Path(job.scratch).mkdir(parents=True, exist_ok=True)
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=job.base, max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=False
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=job.rank, lora_alpha=job.alpha, target_modules=TARGETS, random_state=job.seed
    )
    trainer = metered(SFTTrainer, meter, micro)(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**arguments(job), max_length=LONGEST, completion_only_loss=True),
        train_dataset=Dataset.from_list(
            [{"input_ids": row["input_ids"], "completion_mask": row["mask"]} for row in rows]
        ),
        callbacks=[callback(meter, micro)],
    )
    trainer.train()
    meter.answer(("unsloth", "unsloth-zoo", "trl", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
