"""Unsloth's CPU backend on a benchmark job, in Unsloth's own environment.

    defaults  as FastLanguageModel and SFTTrainer come: gradient checkpointing on, compilation off
    compile   `UNSLOTH_CPU_COMPILE`, its switch for a compiled decoder layer; the rest as it comes
    best      compiled, in the job's number type, and without gradient checkpointing

Without a GPU Unsloth takes its CPU backend by itself (`UNSLOTH_ALLOW_CPU` is another thing: it pretends that
there is a GPU, for tests). It patches transformers and TRL when imported, so it comes first. Packing is not
among them: the CPU backend turns it off. Not known: CUDA, 4 bit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from meter import Job, Meter

job = Job.given()
os.environ.pop("UNSLOTH_ALLOW_CPU", None)
os.environ["UNSLOTH_CPU_COMPILE"] = str(int(job.variant != "defaults"))

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
    best = job.variant == "best"
    again: dict[str, Any] = {"use_gradient_checkpointing": False} if best else {}
    weights = {"dtype": getattr(torch, job.dtype)} if best else {}
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=job.base, max_seq_length=LONGEST, load_in_4bit=False, **again, **weights
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=job.rank, lora_alpha=job.alpha, target_modules=TARGETS, random_state=job.seed, **again
    )
    settings = arguments(job)
    if best:
        settings |= {"gradient_checkpointing": False, "bf16": job.dtype == "bfloat16"}
    trainer = metered(SFTTrainer, meter, micro)(
        model=model,
        processing_class=tokenizer,
        args=SFTConfig(**settings, max_length=LONGEST, completion_only_loss=True),
        train_dataset=Dataset.from_list(
            [{"input_ids": row["input_ids"], "completion_mask": row["mask"]} for row in rows]
        ),
        callbacks=[callback(meter, micro)],
    )
    base = trainer.model.get_base_model()
    meter.facts["weights"] = str(next(base.parameters()).dtype)
    meter.facts["compiled"] = bool(getattr(base, "_unsloth_cpu_compiled", False))
    meter.facts["checkpointing"] = bool(base.is_gradient_checkpointing)
    trainer.train()
    meter.answer(("unsloth", "unsloth-zoo", "trl", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
