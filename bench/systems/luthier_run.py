"""luthier's engine on a benchmark job, whole or with one of its ideas taken out (an ablation).

The variant `full` is what the train stage runs: packed micro-batches, fused layers, compiled formulas, own
attention, tiled head. Every other variant undoes one of them and leaves the rest:

    flat         packed as ever, but what rows begin with alike is computed for each of them
    padded       each micro-batch is 8 rows, padded to the longest of them
    plain-layers PEFT's and transformers' own layers, not `engine.fused`
    uncompiled   the fused layers' formulas as they stand
    sdpa         one call of torch's scaled_dot_product_attention per document
    grouped      attention as torch's products over groups of documents, not in C++ from end to end
    torch-products  torch's matrix products in the layers (only where ours are used at all: bf16 without AMX)
    whole-head   all logits of the learnt tokens at once, through autograd
    glibc        tensors in glibc's heap, not in `engine.heap`
    exact        `full` in float32 without compiling, for comparing losses

It does not know the other systems.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import luthier  # noqa: F401  it sets how long OpenMP threads wait, so it must come before torch

# isort: split
import torch
from meter import Job, Meter
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from luthier.engine import attention, base, batch, documents, fused, head, heap, loop, native
from luthier.engine.kernels import PLAIN, Kernels
from luthier.forecast import fit
from luthier.methods import lora
from luthier.objectives import Batch, sft
from luthier.stages.plan import MICRO_TOKENS, SHARING_TOKENS
from luthier.template import Encoded

PADDED_ROWS = 8


@dataclass(frozen=True)
class Ideas:
    """What is switched on."""

    packed: bool = True
    shared: bool = True
    fused: bool = True
    compiled: bool = True
    own_attention: bool = True
    flash: bool = True
    own_products: bool = True
    tiled: bool = True
    own_heap: bool = True
    dtype: str | None = None  # the job's


VARIANTS = {
    "full": Ideas(),
    "flat": Ideas(shared=False),
    "padded": Ideas(packed=False),
    "plain-layers": Ideas(fused=False),
    "uncompiled": Ideas(compiled=False),
    "sdpa": Ideas(own_attention=False),
    "grouped": Ideas(flash=False),
    "torch-products": Ideas(own_products=False),
    "whole-head": Ideas(tiled=False),
    "glibc": Ideas(own_heap=False),
    "exact": Ideas(compiled=False, dtype="float32"),
}


def untiled_scores(hidden_N_E: Any, weight_V_E: Any, targets_N: Any, tile: int, settle: Any) -> head.Scored:
    """What `head.token_scores` computes, with all logits alive until the backward pass."""
    del tile, settle
    logp_N_V = torch.log_softmax((hidden_N_E @ weight_V_E.T).float(), dim=-1)
    return head.Scored(logp_N_V.gather(1, targets_N[:, None])[:, 0], logp_N_V.argmax(-1) == targets_N)


def formulas(ideas: Ideas) -> Kernels:
    found = native.kernels(ideas.compiled and native.can_compile())
    found = replace(found, flash=found.flash and ideas.flash and ideas.own_attention)
    if ideas.own_products:
        return found
    return replace(found, total=PLAIN.total, outer=PLAIN.outer)


def prepare(job: Job, ideas: Ideas, kernels: Kernels) -> Any:
    """The model as the train stage makes it, less what the variant leaves out."""
    if not ideas.own_attention:
        attention.LONG = 0  # documents longer than this go to torch's kernel
        documents.SHORT = 0  # only documents of equal length share a call
    if not ideas.tiled:
        head.token_scores = untiled_scores
    model = base.load(Path(job.base), ideas.dtype or job.dtype)
    model = lora.attach(model, lora.Params(r=job.rank, alpha=job.alpha), job.seed)
    if job.adapter:
        folder = Path(job.adapter)
        if folder.exists():
            set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        else:
            lora.save(model, folder, "benchmark-base")
    if ideas.fused:
        fused.fuse(model, kernels)
    return model


def encoded(rows: list[dict[str, Any]]) -> list[Encoded]:
    return [
        Encoded(ids=tuple(row["input_ids"]), mask=tuple(map(bool, row["mask"])), id=row["id"]) for row in rows
    ]


def padded(rows: list[Encoded]) -> tuple[Batch, ...]:
    """Micro-batches as most trainers make them: rows in order, all as long as the longest beside them."""
    micros = []
    for at in range(0, len(rows), PADDED_ROWS):
        some = rows[at : at + PADDED_ROWS]
        width = max(len(row.ids) for row in some)
        missing = [width - len(row.ids) for row in some]
        micros.append(
            batch.collate(
                [
                    replace(row, ids=row.ids + (0,) * more, mask=row.mask + (False,) * more)
                    for row, more in zip(some, missing, strict=True)
                ]
            )
        )
    return tuple(micros)


def flat(rows: list[Encoded]) -> tuple[Batch, ...]:
    """Micro-batches of the same budget in which nothing is shared."""
    packed = batch.pack([len(row.ids) for row in rows], MICRO_TOKENS)
    return tuple(batch.collate([rows[number] for number in members], block=0) for members in packed)


def micro_batches(job: Job, ideas: Ideas, rows: list[Encoded]) -> Callable[[int], tuple[Batch, ...]]:
    """The micro-batches of each step, from 1."""
    steps = [rows[at : at + job.batch] for at in range(0, len(rows), job.batch)]

    def computed(budget: int) -> int:
        return sum(sum(batch.sizes(some, budget)) for some in steps)

    budget = fit.enough(computed, MICRO_TOKENS, SHARING_TOKENS)  # as the plan has it

    def of(step: int) -> tuple[Batch, ...]:
        some = steps[step - 1]
        if not ideas.packed:
            return padded(some)
        return batch.micro_batches(some, budget) if ideas.shared else flat(some)

    return of


def training(
    job: Job, ideas: Ideas, kernels: Kernels, rows: list[Encoded]
) -> tuple[Any, Iterator[loop.Step]]:
    """The model as it stands before the first step, and the steps, each done when it is asked for."""
    torch.set_num_threads(job.threads)
    if ideas.own_heap:
        heap.hold()
    else:
        heap.hold_glibc()
    model = prepare(job, ideas, kernels)
    settings = loop.Settings(steps=job.steps, lr=job.lr, seed=job.seed, schedule="constant", formulas=kernels)

    def objective(policy: Any, reference: Any, micro: Batch) -> Any:
        return sft.loss(policy, reference, micro, sft.Params())

    micros, adam = micro_batches(job, ideas, rows), loop.optimiser(model, settings)
    return model, loop.train(model, micros, objective, adam, settings)


def main() -> None:
    job = Job.given()
    ideas = VARIANTS[job.variant]
    told = job.read()
    meter = Meter.over(job, told)
    model, steps = training(job, ideas, formulas(ideas), encoded(told))

    def keep(folder: str) -> None:
        lora.save(model, Path(folder), "benchmark-base")

    meter.start()
    for step in steps:
        meter.step(step.loss, keep)
    meter.answer(("luthier", "torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
