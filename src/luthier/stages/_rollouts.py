"""What a step of on-policy training learns from: answers sampled from the weights as they stand, and scored.

For each prompt of the step a group of answers is drawn (`inference.rollout`), each is scored by the
objective's grader, and the objective says how much better than its group an answer is. Groups whose answers
all score the same teach nothing and are left out, unless all are such. Everything follows from (weights,
seed, number of the sampling), so a training that resumes draws the same answers; where one sampling serves
several steps it is kept in the checkpoint.

Held-out reward is that of the likeliest answer to each validation prompt. A grader that asks a model is
answered by the base without its adapter. It does not know how the loss uses an advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from luthier import artifacts, metrics, template
from luthier.engine import batch, loop
from luthier.errors import GraderError, TrainError
from luthier.inference.generate import Runtime
from luthier.inference.rollout import Asked, Drawing, Policy
from luthier.inference.sampling import Sampling
from luthier.objectives import Batch
from luthier.rows import Message, Prompt, Role, Row, again
from luthier.stages import Inputs
from luthier.stages._descent import Work
from luthier.template import Encoded

Logps = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Exam:
    """Prompts as tokens, how answers become text, and what they are worth."""

    tokenizer: Any
    runtime: Runtime
    grader: Any
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, runtime: Runtime, grader: Any) -> Exam:
        return cls(tokenizer, runtime, grader, template.stop_ids(tokenizer))

    def ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(template.prompt_ids(self.tokenizer, prompt.prompt))

    def text(self, tokens: Sequence[int]) -> str:
        """What a reader sees of an answer."""
        said: str = self.tokenizer.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return said

    def reward(self, prompt: Prompt, answer: str) -> tuple[float, bool]:
        """An answer's reward, and whether the grader could read it."""
        try:
            found, readable = metrics.reward(self.grader, answer, prompt.item, self.ask)
        except GraderError as error:
            raise TrainError(
                f"the grader has no score: {error.what}", where=prompt.where, hint=error.hint
            ) from error
        if not math.isfinite(found):
            raise TrainError(f"the grader's score is {found}", where=prompt.where)
        return found, readable

    def ask(self, question: metrics.Question) -> str:
        """The base's own answer, without the adapter."""
        turns = [Message(Role(role), text) for role, text in question.turns]
        sampling = Sampling(
            max_new_tokens=question.max_new_tokens, temperature=question.temperature, top_p=question.top_p,
            seed=question.seed or 0,
        )  # fmt: skip
        prompt = template.prompt_ids(self.tokenizer, turns)
        return self.text(list(self.runtime.stream(prompt, sampling, None, self.stop_ids)))


@dataclass
class Sampled:
    """One sampling: answers as documents with their advantages, and where needed their log-probabilities."""

    number: int
    documents: list[Encoded]
    advantages: list[float]
    facts: dict[str, float]
    behaviour: list[list[float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        documents = [[one.id, list(one.ids), one.mask.index(True)] for one in self.documents]
        plain = {name: getattr(self, name) for name in ("number", "advantages", "facts", "behaviour")}
        return plain | {"documents": documents}

    @classmethod
    def again(cls, plain: Mapping[str, Any]) -> Sampled:
        documents = [_document(row, ids, start) for row, ids, start in plain["documents"]]
        return cls(**{**plain, "documents": documents})


@dataclass
class Rollouts:
    """The micro-batches of any step, and held-out reward. `sampled` is all of its state."""

    exam: Exam
    policy: Policy
    trained: Callable[[], Mapping[str, Tensor]]
    logps: Logps
    base_logps: Logps | None
    objective: Any
    rows: Mapping[int, Prompt]
    ids: tuple[str, ...]
    held_out: Sequence[Prompt]
    batch: int
    micro_tokens: int
    seed: int
    heed: Callable[[int, int], None]
    sampled: Sampled | None = None

    def __call__(self, step: int) -> tuple[Batch, ...]:
        params = self.objective.params
        number = sampling(step, params)
        if self.sampled is None or self.sampled.number != number:
            self.policy.follow(self.trained())
            self.sampled = self._sample(number)
        found = self.sampled
        micros = []
        for members in batch.bins(found.documents, self.micro_tokens):
            made = batch.collate([found.documents[at] for at in members])
            advantages_D = torch.tensor([found.advantages[at] for at in members])
            micros.append(replace(made, advantages_D=advantages_D, temperature=params.temperature))
        if self.base_logps is not None:
            micros = [replace(micro, reference_N=self.base_logps(micro)) for micro in micros]
        if params.iterations == 1:  # the policy that learns is the one that spoke
            return tuple(micros)
        if not found.behaviour:
            found.behaviour = [self.logps(micro).tolist() for micro in micros]
        return tuple(
            replace(micro, behaviour_N=torch.tensor(logps))
            for micro, logps in zip(micros, found.behaviour, strict=True)
        )

    @property
    def facts(self) -> dict[str, float]:
        """What the answers of the last step were worth."""
        return self.sampled.facts if self.sampled else {}

    def state(self) -> dict[str, Any] | None:
        """The sampling, where a later step may learn from it again."""
        once = self.objective.params.iterations == 1
        return None if once or self.sampled is None else self.sampled.as_dict()

    def restore(self, state: Mapping[str, Any] | None) -> None:
        self.sampled = None if state is None else Sampled.again(state)

    def rows_of(self, step: int) -> list[str]:
        """The ids of the prompts that a step learns from."""
        return [self.ids[row] for row in self._chosen(sampling(step, self.objective.params))]

    def look(self) -> dict[str, float]:
        """The mean reward of the likeliest answers to held-out prompts; as a loss it is what falls."""
        self.policy.follow(self.trained())
        prompts = [self.exam.ids(prompt) for prompt in self.held_out]
        answers = self.policy.greedy(prompts, self._drawing(0), self.heed)
        rewards = [
            self.exam.reward(prompt, self.exam.text(answer))[0]
            for prompt, answer in zip(self.held_out, answers, strict=True)
        ]
        reward = _mean(rewards)
        return {"loss": -reward, "reward": reward, "answer_tokens": _mean([len(one) for one in answers])}

    def _drawing(self, number: int) -> Drawing:
        params = self.objective.params
        return Drawing(self.seed, number, params.max_new_tokens, params.temperature, self.exam.stop_ids)

    def _chosen(self, number: int) -> tuple[int, ...]:
        return batch.rows_of(self.ids, self.batch, self.seed, number)

    def _sample(self, number: int) -> Sampled:
        params = self.objective.params
        prompts = [self.rows[row] for row in self._chosen(number)]
        # A prompt that stands twice in one sampling draws other answers the second time.
        seen: dict[str, int] = {}
        asked = []
        for prompt in prompts:
            seen[prompt.id] = seen.get(prompt.id, -1) + 1
            asked.append(Asked(f"{prompt.id}:{seen[prompt.id]}", self.exam.ids(prompt), params.group))
        answers_P_G = self.policy.sample(asked, self._drawing(number), self.heed)
        graded = [
            [self.exam.reward(prompt, self.exam.text(answer)) for answer in answers]
            for prompt, answers in zip(prompts, answers_P_G, strict=True)
        ]
        rewards_P_G = torch.tensor([[reward for reward, _ in group] for group in graded], dtype=torch.float64)
        advantages_P_G = self.objective.module.advantage(rewards_P_G, params)
        taught_P = advantages_P_G.ne(0).any(dim=1)
        kept = taught_P if bool(taught_P.any()) else torch.ones_like(taught_P)
        documents, advantages = [], []
        for n in kept.nonzero()[:, 0].tolist():
            start = len(asked[n].ids)
            for answer, advantage in zip(answers_P_G[n], advantages_P_G[n].tolist(), strict=True):
                documents.append(_document(prompts[n].id, [*asked[n].ids, *answer], start))
                advantages.append(advantage)
        lengths = [len(answer) for answers in answers_P_G for answer in answers]
        ended = [answer[-1] in self.exam.stop_ids for answers in answers_P_G for answer in answers]
        facts = {
            "reward": float(rewards_P_G.mean()), "reward_std": float(rewards_P_G.std(unbiased=False)),
            "answer_tokens": _mean(lengths), "ended": _mean(ended),
            "flat_groups": int((~taught_P).sum()),
            "unreadable": sum(not readable for group in graded for _, readable in group),
        }  # fmt: skip
        return Sampled(number, documents, advantages, facts)


def ready(work: Work, plan: Mapping[str, Any], inputs: Inputs) -> Work:
    """The work of an on-policy training: steps are sampled, and held-out reward is what is looked at."""
    phase, model, place = work.phase, work.model, work.place
    base = inputs.artefacts["model"] / "base"
    train, validation = (_prompts(inputs, split) for split in ("train", "validation"))
    ids = tuple(prompt.id for prompt in train)
    looked = batch.order(tuple(prompt.id for prompt in validation), inputs.seed, "validation")
    held_out = tuple(validation[row] for row in looked[: phase.validation.rows])
    for prompt in (*train, *held_out):
        metrics.check(phase.objective.params.grader, prompt.item, prompt.where)
    runtime = Runtime.load(base)
    phase.method.module.save(model, inputs.scratch / "policy", "policy")
    first = {f"weight:{name}": weight.detach().clone() for name, weight in loop.trained(model).items()}
    how = work.settings.tile, work.settings.formulas

    def logps(micro: Batch) -> Tensor:
        """As training will compute them, bit for bit; so with gradients, of which none is used."""
        model.eval()
        found: Tensor = place.scores(model, place.put(micro), *how).logp_N.detach().cpu()
        return found

    @torch.no_grad()
    def base_logps(micro: Batch) -> Tensor:
        """With the weights training began with, which leave the base as it is."""
        now = {f"weight:{name}": weight.detach().clone() for name, weight in loop.trained(model).items()}
        loop.put_weights(model, first)
        try:
            return logps(micro)
        finally:
            loop.put_weights(model, now)

    def heed(done: int, whole: int) -> None:
        del done, whole
        if work.stopping():
            raise loop.Asked

    rollouts = Rollouts(
        exam=Exam.of(template.load_tokenizer(base), runtime, phase.objective.params.grader),
        policy=Policy(runtime, inputs.scratch / "policy"),
        trained=lambda: loop.trained(model),
        logps=logps,
        base_logps=base_logps if phase.objective.params.beta else None,
        objective=phase.objective,
        rows=dict(enumerate(train)),
        ids=ids,
        held_out=held_out,
        batch=phase.batch,
        micro_tokens=plan["micro_tokens"],
        seed=inputs.seed,
        heed=heed,
    )
    return replace(work, loader=rollouts, held_out=held_out, rollouts=rollouts)


def _prompts(inputs: Inputs, split: str) -> list[Prompt]:
    records = artifacts.read_jsonl(inputs.artefacts["data"] / "rows" / f"{split}.jsonl")
    return [row for row in map(again, records) if isinstance(row, Prompt)]


def sampling(step: int, params: Any) -> int:
    """The number of the sampling that a step learns from, counted from 1."""
    return (step - 1) // int(params.iterations) + 1


def outlines(tokenizer: Any, prompts: Sequence[Row], params: Any) -> list[tuple[Encoded, ...]]:
    """Documents as long as answers may become, no two alike: what training cannot exceed."""
    letters = [token for token in range(len(tokenizer)) if token not in tokenizer.all_special_ids]
    found = []
    for prompt in prompts:
        ids = template.prompt_ids(tokenizer, prompt.prompt)
        answers = [
            [letters[(answer + at) % len(letters)] for at in range(params.max_new_tokens)]
            for answer in range(params.group)
        ]
        found.append(tuple(_document(prompt.id, [*ids, *answer], len(ids)) for answer in answers))
    return found


def _document(row: str, ids: Sequence[int], start: int) -> Encoded:
    """A prompt and an answer of which every token is learnt."""
    return Encoded(tuple(ids), (False,) * start + (True,) * (len(ids) - start), row)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
