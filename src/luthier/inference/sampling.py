"""Which token comes next: penalties, biases, constraints, temperature, top-k, the nucleus, and the draw.

Sources: the penalties are OpenAI's formula (https://platform.openai.com/docs/advanced-usage, "frequency and
presence penalties": each token's logit less count x frequency and, once it was sampled, less presence);
the nucleus (top-p) is Holtzman et al., https://arxiv.org/abs/1904.09751; top-k is Fan et al., arXiv
1805.04833. Counted are the tokens that were sampled, not the prompt's. The order is: bias, penalties,
constraint, temperature, top-k, top-p. Log-probabilities are the log-softmax of the model's own logits in
float32, before any of that, so they say what the model believes and not what it was made to say.

A row's choice depends on its logits, its own history and its own generator, never on who shares the batch.
It does not know tokens' text, prompts or queues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

COLD = 1e-5  # below it the likeliest token has all the mass, and dividing by it only overflows


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; a seed makes a sampled answer repeatable.

    `top_k` 0 keeps all. `logprobs` None asks for none; a number asks for the chosen token's and for that many
    of the likeliest ones'.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token, and where asked for its log-probability and the likeliest tokens with theirs."""

    token: int
    logp: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """What may be said next, and what was said (`inference/grammar.py`)."""

    def mask(self, vocabulary: int) -> Tensor: ...

    def accept(self, token: int) -> None: ...

    @property
    def ended(self) -> bool: ...


class Chooser:
    """What one sequence carries from token to token: its generator, its counts and its constraint."""

    def __init__(self, sampling: Sampling, constraint: Constraint | None = None) -> None:
        self.sampling = sampling
        self.constraint = constraint
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self._counts: dict[int, int] = {}
        self._penalised = sampling.presence_penalty != 0 or sampling.frequency_penalty != 0

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all it takes."""
        sampling = self.sampling
        return (
            sampling.temperature < COLD
            and sampling.logprobs is None
            and not sampling.logit_bias
            and not self._penalised
            and self.constraint is None
        )

    def choose(self, logits_V: Tensor) -> Chosen:
        """The next token after these logits; it counts as said."""
        raw_V = logits_V.to(device="cpu", dtype=torch.float32)
        shaped_V = self._shaped(raw_V)
        token = choose(shaped_V, self.sampling, self.generator)
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.constraint is not None:
            self.constraint.accept(token)
        if self.sampling.logprobs is None:
            return Chosen(token)
        logp_V = torch.log_softmax(raw_V, dim=-1)
        return Chosen(token, float(logp_V[token]), likeliest(logp_V, self.sampling.logprobs))

    def _shaped(self, raw_V: Tensor) -> Tensor:
        """The logits with biases and penalties, and what may not be said at minus infinity."""
        bias = self.sampling.logit_bias
        if not (bias or self._counts or self.constraint):
            return raw_V
        shaped_V = raw_V.clone()
        for token, more in bias:
            if 0 <= token < len(shaped_V):
                shaped_V[token] += more
        for token, count in self._counts.items():
            shaped_V[token] -= count * self.sampling.frequency_penalty + self.sampling.presence_penalty
        if self.constraint is not None:
            shaped_V.masked_fill_(~self.constraint.mask(len(shaped_V)), float("-inf"))
        return shaped_V


def choose_all(choosers: Sequence[Chooser], logits_B_V: Tensor) -> list[Chosen]:
    """One token for each row; the rows that only want their likeliest token share one pass."""
    plain = [n for n, chooser in enumerate(choosers) if chooser.plain]
    if len(plain) == len(choosers):
        return [Chosen(token) for token in logits_B_V.argmax(-1).tolist()]
    first = dict(zip(plain, logits_B_V[plain].argmax(-1).tolist(), strict=True)) if plain else {}
    return [
        Chosen(first[n]) if n in first else chooser.choose(logits_B_V[n])
        for n, chooser in enumerate(choosers)
    ]


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The likeliest token, or one drawn from the nucleus of the `top_k` likeliest that holds `top_p`."""
    if sampling.temperature < COLD:
        return int(logits_V.argmax())
    p_V, order_V = torch.softmax(logits_V / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    if 0 < sampling.top_k < len(p_V):
        p_V[sampling.top_k :] = 0.0
        p_V /= p_V.sum()
    before_V = p_V.cumsum(0) - p_V
    p_V = p_V.masked_fill(before_V >= sampling.top_p, 0.0)
    p_V[0] = p_V[0].clamp(min=torch.finfo(p_V.dtype).tiny)
    return int(order_V[torch.multinomial(p_V, 1, generator=generator)])


def likeliest(logp_V: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens, likeliest first, with their log-probabilities."""
    if count <= 0:
        return ()
    found = torch.topk(logp_V, min(count, len(logp_V)))
    return tuple(zip(found.indices.tolist(), found.values.tolist(), strict=True))
