"""TRL's SFTTrainer on a benchmark job, in TRL's own environment.

    defaults  what SFTConfig does when nothing is set: float32 weights under bf16 autocast, checkpointing
    best      weights and products in the job's number type, no gradient checkpointing: its fastest on a CPU
    exact     float32 throughout, no checkpointing, for comparing losses

Packing is not among them: without FlashAttention it builds a dense T × T mask. Not known: CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from meter import Job, Meter
from peft import LoraConfig
from trainer import arguments, callback, metered
from trl import SFTConfig, SFTTrainer


def variant(job: Job) -> dict[str, Any]:
    if job.variant == "defaults":
        return {}
    dtype = job.dtype if job.variant == "best" else "float32"
    weights = {"dtype": dtype}
    return {"model_init_kwargs": weights, "gradient_checkpointing": False, "bf16": dtype == "bfloat16"}


def main() -> None:
    job = Job.given()
    rows = job.read()
    meter, micro = Meter.over(job, rows), []
    torch.set_num_threads(job.threads)
    Path(job.scratch).mkdir(parents=True, exist_ok=True)
    trainer = metered(SFTTrainer, meter, micro)(
        model=job.base,
        args=SFTConfig(**arguments(job), completion_only_loss=True, **variant(job)),
        train_dataset=Dataset.from_list(
            [{"input_ids": row["input_ids"], "completion_mask": row["mask"]} for row in rows]
        ),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=job.rank, lora_alpha=job.alpha, target_modules="all-linear"
        ),
        callbacks=[callback(meter, micro)],
    )
    meter.facts["weights"] = str(next(trainer.model.get_base_model().parameters()).dtype)
    trainer.train()
    meter.answer(("trl", "torch", "transformers", "peft", "accelerate"))


if __name__ == "__main__":
    main()
