from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.errors import DataError
from luthier.inference.generate import Runtime
from luthier.inference.score import likelihood


def quiet(done: int, total: int) -> None:
    del done, total


@pytest.fixture(scope="module")
def runtime(tiny_base: Path) -> Runtime:
    return Runtime.load(tiny_base)


@pytest.mark.parametrize("head", [[1, 50, 51, 52, 53], []], ids=["shared prefix", "nothing shared"])
def test_loss_is_the_mean_over_answer_tokens_of_plain_transformers(
    head: list[int], tiny_base: Path, runtime: Runtime
) -> None:
    draw = random.Random(3)
    rows = []
    for _ in range(70):
        prompt = head + draw.choices(range(3, 250), k=draw.randint(1, 12))
        answer = draw.choices(range(3, 250), k=draw.randint(1, 4))
        rows.append(([*prompt, *answer, 9], [False] * len(prompt) + [True] * len(answer) + [False]))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    losses = []
    with torch.inference_mode():
        for ids, mask in rows:
            logp = torch.log_softmax(plain(torch.tensor([ids])).logits[0], -1)
            losses += [-float(logp[t - 1, ids[t]]) for t, learnt in enumerate(mask) if learnt]
    found = likelihood(runtime, rows, None, quiet)
    assert found.tokens == len(losses)
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.perplexity == pytest.approx(float(torch.tensor(found.loss).exp()), rel=1e-5)


def test_rows_equal_up_to_the_middle_of_their_answers_are_still_scored_from_the_first_token(
    runtime: Runtime,
) -> None:
    ids, mask = [1, 20, 21, 22, 23, 24], [False, False, False, True, True, True]
    twice = likelihood(runtime, [(ids, mask), (ids, mask)], None, quiet)
    once = likelihood(runtime, [(ids, mask)], None, quiet)
    assert (twice.tokens, once.tokens) == (6, 3)
    assert twice.loss == pytest.approx(once.loss, rel=1e-5)


def test_rows_without_an_answer_token_are_refused(runtime: Runtime) -> None:
    with pytest.raises(DataError, match="no row has an answer"):
        likelihood(runtime, [([1, 2], [False, False])], None, quiet)
