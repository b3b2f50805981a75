"""GRPO: advantages and losses against cases worked by hand, and the gradient of a plain policy gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from luthier import metrics
from luthier.objectives import Batch, grpo

GRADER = {"name": "string_check", "reference": "{{ item.answer }}"}


def params(**changes: Any) -> grpo.Params:
    return grpo.Params.model_validate({"grader": GRADER, "max_new_tokens": 4, **changes})


def batch(advantages: list[float], lengths: list[int], behaviour: Tensor | None = None) -> Batch:
    """Answers of these lengths, one token of prompt before each."""
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    total = sum(lengths) + len(lengths)
    return Batch(
        ids_T=torch.zeros(total, dtype=torch.long), positions_T=torch.zeros(total, dtype=torch.long),
        lengths_D=tuple(length + 1 for length in lengths), places_N=torch.zeros(len(rows), dtype=torch.long),
        targets_N=torch.zeros(len(rows), dtype=torch.long), rows_N=torch.tensor(rows),
        rows=tuple(map(str, range(len(lengths)))), advantages_D=torch.tensor(advantages),
        behaviour_N=behaviour,
    )  # fmt: skip


def test_an_advantage_is_the_distance_from_the_groups_mean() -> None:
    found = grpo.advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]]), params())
    assert found.tolist() == [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]


def test_scaled_by_the_deviation_it_is_deepseekmaths() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    found = grpo.advantage(rewards, params(scale="std"))
    assert found[0, 0].item() == pytest.approx(0.5 / (math.sqrt(1 / 3) + 1e-4))


@pytest.mark.parametrize("scale", ["none", "std"])
@given(value=st.floats(-1e3, 1e3), size=st.integers(2, 9))
def test_equal_rewards_have_no_advantage_whatever_their_rounding(scale: str, value: float, size: int) -> None:
    found = grpo.advantage(torch.full((1, size), value), params(scale=scale))
    assert not found.any() and not grpo.informative(found[0].tolist())


def test_the_clipped_loss_of_a_case_worked_by_hand() -> None:
    # ratios 1.5 and 0.5: with A = 2 the first is cut to 1.2, the second is not; with A = -2 the other way
    behaviour = torch.zeros(2)
    policy = torch.log(torch.tensor([1.5, 0.5]))
    up = grpo.loss(policy, None, batch([2.0], [2], behaviour), params(normalise="tokens"))
    down = grpo.loss(policy, None, batch([-2.0], [2], behaviour), params(normalise="tokens"))
    assert up.total.item() == pytest.approx(-(1.2 * 2 + 0.5 * 2)) and up.count == 2
    assert down.total.item() == pytest.approx(1.5 * 2 + 0.8 * 2)
    assert up.metrics["clipped"] == down.metrics["clipped"] == 1.0
    higher = grpo.loss(policy, None, batch([2.0], [2], behaviour), params(normalise="tokens", clip_high=0.28))
    assert higher.total.item() == pytest.approx(-(1.28 * 2 + 0.5 * 2))


@pytest.mark.parametrize(
    ("normalise", "total", "count"),
    [("tokens", -(3 * 1.0 - 1 * 2.0), 4), ("answers", -(1.0 - 2.0), 2), ("constant", -(3 / 4 - 2 / 4), 2)],
)
def test_each_normalisation_weighs_answers_as_its_paper_says(
    normalise: str, total: float, count: int
) -> None:
    found = grpo.loss(torch.zeros(4), None, batch([1.0, -2.0], [3, 1]), params(normalise=normalise))
    assert (found.total.item(), found.count) == (pytest.approx(total), count)


def test_the_divergence_is_k3_and_weighs_as_beta_says() -> None:
    policy, reference = torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.25, 0.4]))
    k3 = [0.5 - math.log(0.5) - 1, 2.0 - math.log(2.0) - 1]
    found = grpo.loss(policy, reference, batch([0.0], [2]), params(beta=0.1, normalise="tokens"))
    assert found.total.item() == pytest.approx(0.1 * sum(k3)) and found.metrics["kl"] == pytest.approx(
        sum(k3)
    )


@pytest.mark.parametrize("normalise", ["tokens", "answers", "constant"])
def test_with_one_update_the_gradient_is_the_policys(normalise: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 7, requires_grad=True)
    said, rows = torch.tensor([1, 4, 2, 0, 6]), torch.tensor([0, 0, 0, 1, 1])
    advantages, lengths = torch.tensor([0.75, -1.5]), torch.tensor([3.0, 2.0])
    policy = torch.log_softmax(logits, -1).gather(1, said[:, None])[:, 0]
    made = grpo.loss(policy, None, batch(advantages.tolist(), [3, 2]), params(normalise=normalise))
    (found,) = torch.autograd.grad(made.total, logits)
    plain = torch.log_softmax(logits, -1).gather(1, said[:, None])[:, 0] * advantages[rows]  # REINFORCE
    weights = {"tokens": torch.ones(5), "answers": 1 / lengths[rows], "constant": torch.full((5,), 1 / 4)}
    (wanted,) = torch.autograd.grad(-(plain * weights[normalise]).sum(), logits)
    torch.testing.assert_close(found, wanted)
    assert made.metrics["clipped"] == 0.0


@given(st.integers(0, 2**31))
def test_any_loss_is_that_of_a_token_at_a_time(seed: int) -> None:
    torch.manual_seed(seed)
    settings = params(beta=0.05, clip_high=0.3, normalise="answers")
    lengths, advantages = [3, 1, 2], torch.randn(3).tolist()
    policy, old, reference = (-torch.rand(6) * 3 for _ in range(3))
    total, at = 0.0, 0
    for length, a in zip(lengths, advantages, strict=True):
        for n in range(at, at + length):
            ratio = math.exp(policy[n] - old[n])
            clipped = min(max(ratio, 0.8), 1.3)
            q = math.exp(reference[n] - policy[n])
            total += (-min(ratio * a, clipped * a) + 0.05 * (q - math.log(q) - 1)) / length
        at += length
    found = grpo.loss(policy, reference, batch(advantages, lengths, old), settings)
    assert found.total.item() == pytest.approx(total, rel=1e-4, abs=1e-5)


def test_a_grader_may_be_written_as_openai_writes_it() -> None:
    check = {"type": "string_check", "name": "same", "input": "{{ sample.output_text }}",
             "reference": "{{ item.answer }}", "operation": "eq"}  # fmt: skip
    both = {"type": "multi", "name": "both", "graders": {"same": check}, "calculate_output": "same"}
    for grader in (check, both):
        assert params(grader=grader).grader == metrics.read(grader)
        assert params(grader=params(grader=grader).grader.as_dict()).grader == metrics.read(grader)
    with pytest.raises(ValidationError, match="unknown metric 'python'"):
        params(grader={"type": "python", "name": "x", "source": "1"})
