"""Operations are counted as torch counts them while a real step runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from luthier.engine import batch, fused, head, native
from luthier.engine.attention import IMPLEMENTATION
from luthier.forecast import flops, footprint, layout
from luthier.forecast.footprint import Checkpointing
from luthier.template import Encoded
from tests.engine.tiny_families import FAMILIES

# torch counts `addmm` and `baddbmm` and, of their kinds that add in place, nothing
COUNTED: dict[Any, Any] = {
    torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2],
}
TARGETS = ("all-linear", ["q_proj", "v_proj"], ["down_proj"], ["o_proj"])


def rows(lengths: list[int], shared: int = 0) -> list[Encoded]:
    draw = torch.Generator().manual_seed(3)
    begin = tuple(torch.randint(0, 97, (shared,), generator=draw).tolist())
    made = []
    for number, length in enumerate(lengths):
        ids = begin + tuple(torch.randint(0, 97, (length - shared,), generator=draw).tolist())
        made.append(Encoded(ids, tuple(at >= length - 3 for at in range(length)), str(number)))
    return made


def adapted(family: str, targets: Any, rank: int, compiled: bool = False) -> tuple[Any, footprint.Shape]:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=IMPLEMENTATION)
    names = [
        name for name, part in model.named_modules()
        if isinstance(part, torch.nn.Linear) and part is not model.get_output_embeddings()
        and (targets == "all-linear" or name.rsplit(".", 1)[-1] in targets)
    ]  # fmt: skip
    shape = footprint.shape(model, dict.fromkeys(names, rank), 4)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=targets)
    model = get_peft_model(model, config)
    fused.fuse(model, native.kernels(compiled))
    return model.train(), shape


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize(("lengths", "shared"), [([20, 9, 31], 0), ([40, 37, 50], 32), ([300], 0)])
def test_a_steps_operations_are_those_that_torch_counts(
    targets: Any, lengths: list[int], shared: int
) -> None:
    model, shape = adapted("llama", targets, 4)
    given = rows(lengths, shared)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        head.batch_logps(model, batch.collate(given)).sum().backward()
    assert flops.training(shape, layout.of(given)).total == counter.get_total_flops()


@pytest.mark.parametrize("family", ["mistral", "gemma3", "qwen3", "phi3"])
def test_other_families_are_counted_the_same_way(family: str) -> None:
    model, shape = adapted(family, "all-linear", 2)
    given = rows([12, 30])
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        head.batch_logps(model, batch.collate(given)).sum().backward()
    assert flops.training(shape, layout.of(given)).total == counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, torch.no_grad():
        head.batch_logps(model.eval(), batch.collate(given))
    assert flops.validation(shape, layout.of(given)).total == counter.get_total_flops()


def test_computing_again_costs_a_forward_pass_at_most() -> None:
    _, shape = adapted("llama", "all-linear", 4)
    at = layout.of(rows([20, 9]))
    none, selective, full = (flops.training(shape, at, kind) for kind in Checkpointing)
    assert none.total < selective.total < full.total
    assert full.total - none.total == flops.validation(shape, at).total - flops.validation(shape, at).head
    assert selective.blocks - none.blocks == shape.layers * 2 * at.tokens * shape.width * 2 * shape.inner


def test_operations_add_up_by_kind() -> None:
    _, shape = adapted("llama", "all-linear", 4)
    one = flops.training(shape, layout.of(rows([20, 9])))
    both = flops.summed([one, one])
    assert both.total == sum(both.as_dict().values()) - both.as_dict()["total"] == 2 * one.total
    assert one.useful < one.total
    assert flops.training(replace(shape, layers=1), layout.of(rows([20, 9]))).total < one.total
