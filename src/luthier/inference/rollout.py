"""Answers sampled from the policy as it stands: what on-policy training learns from.

The policy answers through the engine that serves (`generate.Runtime`): the base, and beside it the very
weights that train, copied in before each sampling. A prompt is read once for all its answers. A token is the
one at which the summed probabilities pass a random number; the numbers of an answer come from a seed of
(seed, sampling, row, answer), so an answer depends on nothing but the weights, and a resumed training draws
the same ones. Nothing is cut from the distribution: what is sampled is what learns (Ahmadian et al. 2024,
arXiv 2402.14740, on top-p under a policy gradient).

It does not know rewards, rows' fields or what becomes of the answers. One thread owns it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from luthier.errors import TrainError
from luthier.inference.generate import LAST, Runtime

POLICY = "policy"
ROWS = 64  # answers that grow together
CACHED_TOKENS = 65_536  # and the tokens they may come to hold, padding too


@dataclass(frozen=True)
class Asked:
    """A prompt as tokens, with its row's id, and how many answers it gets."""

    id: str
    ids: tuple[int, ...]
    answers: int


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. `number` counts samplings, so that no two draw the same numbers."""

    seed: int
    number: int
    max_new_tokens: int
    temperature: float
    stop_ids: frozenset[int]


class Policy:
    """The policy beside its base in the serving engine, and the way its weights get there."""

    def __init__(self, runtime: Runtime, adapter: Path) -> None:
        """`adapter` is a folder with an adapter of the shape that trains; its weights do not matter."""
        self.runtime = runtime
        runtime.add(POLICY, adapter)
        self._held = {
            name.replace(f".{POLICY}.", "."): weight
            for name, weight in runtime.under(POLICY).named_parameters()
            if f".{POLICY}." in name
        }

    @torch.no_grad()
    def follow(self, trained: Mapping[str, Tensor]) -> None:
        """Take the weights that train, by PEFT's names."""
        given = {
            name.removeprefix("base_model.model.").replace(".default.", "."): weight
            for name, weight in trained.items()
        }
        if given.keys() != self._held.keys():
            odd = sorted(given.keys() ^ self._held.keys())
            raise TrainError(f"the weights that train are not the ones that answer: {odd[0]}")
        for name, weight in given.items():
            self._held[name].copy_(weight)

    def sample(
        self, prompts: Sequence[Asked], how: Drawing, tell: Callable[[int, int], None]
    ) -> list[list[list[int]]]:
        """The policy's answers to each prompt."""
        return sample(self.runtime.under(POLICY), prompts, how, tell)

    def greedy(
        self, prompts: Sequence[Sequence[int]], how: Drawing, tell: Callable[[int, int], None]
    ) -> list[list[int]]:
        """The likeliest answer to each prompt."""
        return self.runtime.greedy(prompts, how.max_new_tokens, POLICY, how.stop_ids, tell)


@torch.inference_mode()
def sample(
    model: Any, prompts: Sequence[Asked], how: Drawing, tell: Callable[[int, int], None]
) -> list[list[list[int]]]:
    """The answers to each prompt as tokens, each with the stop token that ended it, if one did."""
    if any(not prompt.ids for prompt in prompts):
        raise TrainError("an empty prompt has no next token")
    found: dict[int, list[list[int]]] = {}
    done, whole = 0, sum(prompt.answers for prompt in prompts)
    for some in _together(prompts, how):
        grown = iter(_grow(model, [prompts[n] for n in some], how))
        for n in some:
            found[n] = [next(grown) for _ in range(prompts[n].answers)]
            done += prompts[n].answers
        tell(done, whole)
    return [found[n] for n in range(len(prompts))]


def _together(prompts: Sequence[Asked], how: Drawing) -> Iterator[list[int]]:
    """Numbers of the prompts whose answers grow together: of like length, the longest first."""
    some: list[int] = []
    rows = 0
    for n in sorted(range(len(prompts)), key=lambda n: (-len(prompts[n].ids), n)):
        grown = rows + prompts[n].answers
        widest = len(prompts[some[0] if some else n].ids) + how.max_new_tokens
        if some and (grown > ROWS or grown * widest > CACHED_TOKENS):
            yield some
            some, grown = [], prompts[n].answers
        some.append(n)
        rows = grown
    if some:
        yield some


def _grow(model: Any, prompts: Sequence[Asked], how: Drawing) -> list[list[int]]:
    """Every answer to these prompts, in order: left-padded, each prompt read once."""
    widest = max(len(prompt.ids) for prompt in prompts)
    pads_P = torch.tensor([widest - len(prompt.ids) for prompt in prompts])
    ids_BT = torch.tensor([[0] * (widest - len(prompt.ids)) + list(prompt.ids) for prompt in prompts])
    mask_BT = (torch.arange(widest) >= pads_P[:, None]).long()
    at_BT = (torch.arange(widest) - pads_P[:, None]).clamp(min=0)
    fan_B = torch.repeat_interleave(
        torch.arange(len(prompts)), torch.tensor([prompt.answers for prompt in prompts])
    )
    chances = [_chance(prompt.id, answer, how) for prompt in prompts for answer in range(prompt.answers)]
    chance_B_T = torch.stack(chances)
    cache = DynamicCache(config=model.config)
    answers: list[list[int]] = [[] for _ in chances]
    alive = list(range(len(answers)))
    for at in range(how.max_new_tokens):
        out = model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=at_BT, past_key_values=cache,
            use_cache=True, logits_to_keep=LAST,
        )  # fmt: skip
        logits_B_V = out.logits[:, -1].float()
        if at == 0:  # from here on a row is an answer
            cache.batch_select_indices(fan_B)
            logits_B_V, mask_BT, at_BT = logits_B_V[fan_B], mask_BT[fan_B], at_BT[fan_B]
        chosen = draw(logits_B_V / how.temperature, chance_B_T[alive, at])
        for row, token in zip(alive, chosen, strict=True):
            answers[row].append(token)
        keep = [n for n, token in enumerate(chosen) if token not in how.stop_ids]
        if not keep:
            break
        if len(keep) < len(alive):
            alive = [alive[n] for n in keep]
            cache.batch_select_indices(torch.tensor(keep))
            mask_BT, at_BT = mask_BT[keep], at_BT[keep]
        ids_BT = torch.tensor([[chosen[n]] for n in keep])
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(keep), 1)], dim=1)
        at_BT = at_BT[:, -1:] + 1
    return answers


def draw(logits_B_V: Tensor, chance_B: Tensor) -> list[int]:
    """For each row the first token at which the summed probabilities pass its number in [0, 1)."""
    sums_B_V = torch.softmax(logits_B_V.double(), dim=-1).cumsum(-1)
    passed_B = torch.searchsorted(sums_B_V, (chance_B[:, None] * sums_B_V[:, -1:]), right=True)[:, 0]
    found: list[int] = passed_B.clamp(max=logits_B_V.shape[-1] - 1).tolist()
    return found


def _chance(row: str, answer: int, how: Drawing) -> Tensor:
    """An answer's random numbers, one a token."""
    text = f"rollout:{how.seed}:{how.number}:{row}:{answer}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
    return torch.rand(how.max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
