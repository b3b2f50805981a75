"""What the three rivals share: they all train through transformers' Trainer, so they are metered there.

The rows come in the order of the file (a sequential sampler), the adapter starts from the given weights,
and the loss of a step is the sum of what `training_step` returns, unrounded: the Trainer has divided each by
the learnt tokens of the whole step. It does not know which rival it measures, nor its settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meter import Job, Meter

ROWS_AT_ONCE = 8  # per_device_train_batch_size where nobody sets it


def metered(trainer_class: Any, meter: Meter, micro: list[float]) -> Any:
    """The trainer class with an order of rows, and with an eye on each loss."""
    from torch.utils.data import SequentialSampler

    class Metered(trainer_class):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            micro.append(float(loss.detach()))
            return loss

    return Metered


def callback(meter: Meter, micro: list[float]) -> Any:
    """Starts the clock, with the given adapter in place, and stops it at the end of each step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if meter.job.adapter:
                put(kwargs["model"], meter.job.adapter)
            meter.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loss = sum(micro)
            micro.clear()
            meter.step(loss, lambda folder: kwargs["model"].save_pretrained(folder))

    return Watch()


def put(model: Any, folder: str) -> None:
    """Set the adapter's weights; every tensor of the file must have found its place."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    found = set_peft_model_state_dict(model, load_file(Path(folder) / "adapter_model.safetensors"))
    if found.unexpected_keys:
        raise SystemExit(f"the adapter does not fit: {found.unexpected_keys[:3]}")


def arguments(job: Job) -> dict[str, Any]:
    """Settings of TrainingArguments that a fair comparison fixes; the rest stay defaults."""
    rows = min(ROWS_AT_ONCE, job.batch)
    return {
        "output_dir": str(Path(job.scratch) / "out"),
        "max_steps": job.steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": job.batch // rows,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "seed": job.seed,
        "use_cpu": True,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
