"""Supervised fine-tuning is minus the log-likelihood of the answers, as a sum."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from luthier import plugins
from luthier.engine import batch
from luthier.objectives import sft
from luthier.template import Encoded

BATCH = batch.collate([Encoded((1, 2, 3), (False, True, True), "a")])


def test_sft_loss_is_the_sum_of_minus_log_p_over_answer_tokens() -> None:
    found = sft.loss(torch.tensor([-0.5, -2.0]), None, BATCH, sft.Params())
    assert found.total.item() == 2.5 and found.count == 2


def test_sft_slope_is_minus_one_for_every_answer_token() -> None:
    policy = torch.tensor([-0.5, -2.0], requires_grad=True)
    sft.loss(policy, None, BATCH, sft.Params()).total.backward()
    assert policy.grad is not None and policy.grad.tolist() == [-1.0, -1.0]


def test_sft_has_no_knobs_and_needs_nothing() -> None:
    assert plugins.load("objectives", "sft") is sft and frozenset() == sft.NEEDS and sft.ROWS == "Chat"
    with pytest.raises(ValidationError):
        sft.Params.model_validate({"beta": 0.1})
