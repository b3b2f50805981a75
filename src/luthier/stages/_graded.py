"""Evaluation by a grader: the reward of base and tuned on the same prompts, each with its uncertainty.

Both give their likeliest answer, as long as it may be in training; the grader is the one the training was
rewarded by. Means have bootstrap intervals, the difference is paired row by row (`statistics`), and p is that
of the exact sign test. A grader that asks a model is answered by the base. It does not know gates, nor
whether the reward is worth having.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier import metrics, statistics
from luthier.rows import Prompt
from luthier.stages._rollouts import Exam

TUNED = "tuned"
NOTES = {
    "base": "the untouched base, asked as the tuned model is",
    TUNED: "the base under the trained adapter",
}


@dataclass(frozen=True)
class Judged:
    """What each system said to each prompt, and what it was worth."""

    texts: Mapping[str, Sequence[str]]
    rewards: Mapping[str, Sequence[float]]
    unreadable: Mapping[str, int]
    tokens: Mapping[str, float]


def judge(exam: Exam, prompts: Sequence[Prompt], answers: Mapping[str, Sequence[Sequence[int]]]) -> Judged:
    for prompt in prompts:
        metrics.check(exam.grader, prompt.item, prompt.where)
    texts = {name: [exam.text(tokens) for tokens in said] for name, said in answers.items()}
    graded = {
        name: [exam.reward(prompt, text) for prompt, text in zip(prompts, said, strict=True)]
        for name, said in texts.items()
    }
    return Judged(
        texts,
        {name: [reward for reward, _ in found] for name, found in graded.items()},
        {name: sum(not readable for _, readable in found) for name, found in graded.items()},
        {name: sum(map(len, said)) / len(said) for name, said in answers.items()},
    )


def scorecard(judged: Judged, params: Any, split: str, seed: int) -> dict[str, Any]:
    systems = {}
    for name, rewards in judged.rewards.items():
        low, high = statistics.bootstrap(rewards, seed)
        systems[name] = {
            "reward": sum(rewards) / len(rewards), "low": low, "high": high, "accuracy": None, "f1": None,
            "unparsed": judged.unreadable[name], "answer_tokens": judged.tokens[name], "note": NOTES[name],
        }  # fmt: skip
    gains = [a - b for a, b in zip(judged.rewards[TUNED], judged.rewards["base"], strict=True)]
    wins, losses = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    low, high = statistics.bootstrap(gains, seed)
    paired = {
        "wins": wins, "losses": losses, "p": statistics.mcnemar(wins, losses),
        "difference": sum(gains) / len(gains), "low": low, "high": high,
    }  # fmt: skip
    return {
        "measure": "reward",
        "grader": params.grader.as_dict(),
        "rows": len(gains),
        "split": split,
        "labels": [],
        "positive": None,
        "max_new_tokens": params.max_new_tokens,
        "likelihood_rows": 0,
        "systems": systems,
        "paired": {f"{TUNED}_vs_base": paired},
        "loss": {},
        "perplexity": {},
    }


def samples(judged: Judged, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    return [
        {
            "id": prompt.id,
            "where": prompt.where,
            "gold": None,
            "prompt": prompt.prompt[-1].content,
            "answers": {name: said[n] for name, said in judged.texts.items()},
            "rewards": {name: found[n] for name, found in judged.rewards.items()},
            "said": {},
            "correct": {},
        }
        for n, prompt in enumerate(prompts)
    ]
