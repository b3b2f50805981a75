"""Answers sampled from the policy: its own distribution, the same ones again, whoever else is asked."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from luthier.engine import base, loop
from luthier.errors import TrainError
from luthier.inference.generate import Runtime
from luthier.inference.rollout import Asked, Drawing, Policy, draw
from luthier.methods import lora

STOP = frozenset({2})
HOW = Drawing(seed=3, number=1, max_new_tokens=12, temperature=1.0, stop_ids=STOP)
PROMPTS = [Asked("a", (1, 70, 80, 90), 4), Asked("b", (1, 60), 3), Asked("c", tuple(range(40, 60)), 5)]


def trained(tiny_base: Path, seed: int) -> torch.nn.Module:
    model = lora.attach(base.load(tiny_base, "float32"), lora.Params(r=4), seed)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in loop.trained(model).values():
            weight.add_(torch.randn(weight.shape, generator=noise) * 0.2)
    return model


@pytest.fixture(scope="module")
def policy(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("policy")
    lora.save(trained(tiny_base, 1), folder, "base")
    return Policy(Runtime.load(tiny_base), folder)


def sampled(policy: Policy, prompts: list[Asked] = PROMPTS, how: Drawing = HOW) -> list[list[list[int]]]:
    return policy.sample(prompts, how, lambda done, whole: None)


def test_the_same_drawing_gives_the_same_answers_and_another_gives_others(policy: Policy) -> None:
    first = sampled(policy)
    assert [len(answers) for answers in first] == [4, 3, 5]
    assert sampled(policy) == first
    assert sampled(policy, how=Drawing(3, 2, 12, 1.0, STOP)) != first
    assert len({tuple(answer) for answer in first[0]}) > 1


def test_an_answer_does_not_depend_on_who_else_is_asked(policy: Policy) -> None:
    together = sampled(policy)
    for prompt, answers in zip(PROMPTS, together, strict=True):
        assert sampled(policy, [prompt]) == [answers]


def test_answers_end_with_a_stop_token_or_at_their_longest(policy: Policy) -> None:
    for answer in (answer for answers in sampled(policy) for answer in answers):
        assert len(answer) == 12 or answer[-1] in STOP
        assert not STOP & set(answer[:-1])


def test_the_policy_follows_the_weights_that_train(policy: Policy, tiny_base: Path) -> None:
    before = sampled(policy)
    model = trained(tiny_base, 9)
    policy.follow(loop.trained(model))
    after = sampled(policy)
    assert after != before
    model.set_attn_implementation("sdpa")
    for prompt in PROMPTS:
        ids = torch.tensor([list(prompt.ids)])
        plain = model.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            eos_token_id=2, pad_token_id=2,
        )[0, len(prompt.ids) :].tolist()  # fmt: skip
        assert policy.greedy([prompt.ids], HOW, lambda done, whole: None) == [plain]


def test_weights_of_another_shape_are_refused(policy: Policy, tiny_base: Path) -> None:
    model = lora.attach(base.load(tiny_base, "float32"), lora.Params(r=4, targets=("q_proj",)), 1)
    with pytest.raises(TrainError, match="not the ones that answer"):
        policy.follow(loop.trained(model))


def test_tokens_come_as_often_as_their_probability_says() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -30.0]])
    numbers = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    counts = Counter(draw(logits.expand(10_000, -1), numbers))
    wanted = torch.softmax(logits[0], -1)
    assert [counts[token] / 10_000 for token in range(4)] == pytest.approx(wanted.tolist(), abs=1e-3)


def test_the_first_and_the_last_number_draw_a_token_that_has_a_chance() -> None:
    logits = torch.tensor([[-1e9, 0.0, 0.0, -1e9]] * 2)
    assert draw(logits, torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)) == [1, 2]
