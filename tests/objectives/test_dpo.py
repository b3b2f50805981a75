"""The preference loss: log 2 where nothing has moved, and by hand from plain logits elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.engine import base, batch, fused, head
from luthier.engine.native import kernels
from luthier.methods import lora
from luthier.objectives import Batch, dpo
from luthier.template import Encoded
from tests.engine.test_trie import text

PARAMS = dpo.Params(beta=0.3)


def pairs(count: int = 3, prompt: int = 20) -> list[Encoded]:
    found = []
    for n in range(count):
        asked = text(n, prompt)
        for part, length in enumerate((9, 5)):
            ids = asked + text(100 + 2 * n + part, length)
            found.append(Encoded(ids, tuple(at >= prompt for at in range(len(ids))), str(n), part))
    return found


def by_hand(policy: Any, reference: list[float], documents: list[Encoded], smooth: float = 0.0) -> Any:
    """Equation 7 over whole padded-free rows of a plain transformers model, as TRL's trainer has it."""
    said = []
    for row in documents:
        ids = torch.tensor([row.ids])
        logps = torch.log_softmax(policy(input_ids=ids).logits[0, :-1].float(), -1)
        chosen = logps.gather(1, ids[0, 1:, None])[:, 0]
        said.append((chosen * torch.tensor(row.mask[1:])).sum())
    ratios = torch.stack(said) - torch.tensor(reference)
    h = 0.3 * (ratios[::2] - ratios[1::2])
    sigmoid = torch.nn.functional.logsigmoid
    return (-(1 - smooth) * sigmoid(h) - smooth * sigmoid(-h)).mean()


def moved(tiny: Path) -> Any:
    model = lora.attach(base.load(tiny, "float32"), lora.Params(r=4), 1)
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if ".lora_B." in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=noise))
    return model


def sums(model: Any, documents: list[Encoded]) -> list[float]:
    with torch.no_grad():
        micro = batch.collate(documents, 0)
        logp_N = head.batch_logps(model, micro)
        return torch.zeros(len(documents)).index_add(0, micro.rows_N, logp_N).tolist()


def referred(model: Any, micro: Batch) -> torch.Tensor:
    with torch.no_grad():
        return head.batch_logps(model, micro)


def test_dpo_loss_is_log_two_when_policy_equals_reference() -> None:
    micro = batch.collate(pairs())
    logp_N = -torch.rand(len(micro.targets_N))
    for smooth in (0.0, 0.2):
        found = dpo.loss(logp_N, logp_N, micro, dpo.Params(label_smoothing=smooth))
        assert found.count == 3 and float(found.total) / 3 == pytest.approx(math.log(2), abs=1e-6)
        assert found.metrics["margin"] == found.metrics["preferred"] == 0


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("block", "smooth"), [(0, 0.0), (4, 0.0), (16, 0.2)])
def test_packed_and_shared_it_has_the_loss_and_gradients_of_plain_rows(
    tiny_base: Path, block: int, smooth: float, fuse: bool
) -> None:
    documents = pairs()
    start = base.load(tiny_base, "float32")
    reference = sums(start, documents)
    plain, ours = moved(tiny_base), moved(tiny_base)
    plain.set_attn_implementation("eager")
    expected = by_hand(plain, reference, documents, smooth)
    expected.backward()
    if fuse:
        fused.fuse(ours, kernels(compiled=False))
    params = dpo.Params(beta=0.3, label_smoothing=smooth)
    groups = [documents] if block else [documents[:2], documents[2:]]  # one batch, or two micro-batches
    total = 0.0
    for group in groups:
        micro = batch.collate(group, block)
        assert (len(micro.ids_T) < sum(micro.lengths_D)) == bool(block)
        found = dpo.loss(head.batch_logps(ours, micro), referred(start, micro), micro, params)
        (found.total / 3).backward()
        total += float(found.total) / 3
    assert total == pytest.approx(float(expected), rel=1e-5)
    grads = [
        {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
        for model in (ours, plain)
    ]
    assert grads[0].keys() == grads[1].keys() and grads[0]
    largest = max(float(gradient.norm()) for gradient in grads[1].values())
    for name, gradient in grads[1].items():
        assert float((grads[0][name] - gradient).norm()) <= 1e-5 * max(float(gradient.norm()), 0.05 * largest)


def test_metrics_are_sums_over_pairs() -> None:
    micro = batch.collate(pairs(2))
    reference = torch.full((len(micro.targets_N),), -2.0)
    chosen = torch.tensor([row % 2 == 0 for row in micro.rows_N.tolist()])
    policy = torch.where(chosen, torch.tensor(-1.0), torch.tensor(-3.0))
    found = dpo.loss(policy, reference, micro, PARAMS)
    assert found.metrics["preferred"] == 2
    assert found.metrics["margin"] == pytest.approx(2 * 0.3 * (9 + 5))
    assert found.metrics["chosen_logp"] == pytest.approx(2 * -9.0)
    assert found.metrics["rejected_logp"] == pytest.approx(2 * -15.0)
    assert found.metrics.keys() == set(dpo.METRICS)
