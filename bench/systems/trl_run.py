"""TRL's SFTTrainer on a benchmark job, in TRL's own environment.

    defaults  what SFTConfig does when nothing is set: float32 weights under bf16 autocast, checkpointing
    best      bf16 weights, no gradient checkpointing: its fastest on a CPU
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

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "best": {"model_init_kwargs": {"dtype": "bfloat16"}, "gradient_checkpointing": False},
    "exact": {"model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False, "bf16": False},
}


def main() -> None:
    job = Job.given()
    rows = job.read()
    meter, micro = Meter.over(job, rows), []
    torch.set_num_threads(job.threads)
    Path(job.scratch).mkdir(parents=True, exist_ok=True)
    trainer = metered(SFTTrainer, meter, micro)(
        model=job.base,
        args=SFTConfig(**arguments(job), completion_only_loss=True, **VARIANTS[job.variant]),
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
