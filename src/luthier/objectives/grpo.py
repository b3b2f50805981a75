"""GRPO: answers of the policy are scored in groups, and those better than their group become likelier.

Sources: group-relative advantage and the clipped ratio, Shao et al. 2024 (DeepSeekMath, arXiv 2402.03300,
equations 3 and 4); for each token t of an answer with advantage A, with r = p(t) / p_old(t),

    L = - min(r A, clip(r, 1 - clip, 1 + clip_high) A) + beta (q - log q - 1),    q = p_ref(t) / p(t)

the last term being the k3 estimate of the KL divergence to the reference (Schulman 2020). A higher bound
above than below is DAPO's clip-higher (Yu et al. 2025, arXiv 2503.14476). By default advantages are not
divided by the group's standard deviation and an answer's tokens are summed, over the longest an answer may be
(Dr. GRPO, Liu et al. 2025, arXiv 2503.20783): dividing by an answer's own length favours long wrong answers,
dividing by the deviation favours questions that are nearly always or nearly never answered. `normalise:
answers` with `scale: std` is GRPO as first published, `normalise: tokens` is DAPO's.

With one update a sampling, p_old is p itself: r is 1 and the gradient that of the policy. It does not know
how answers are sampled or scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from luthier import plugins
from luthier.objectives import Batch, Loss

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
ROWS = "Prompt"
NEEDS: frozenset[str] = frozenset({"rollouts"})
METRICS = ("clipped", "kl")
LEAST_STD = 1e-4  # what is added to a group's deviation before it divides


def named(grader: object) -> object:
    """OpenAI's form of a grader (its kind is `type`, its own name is `name`) as parts are written."""
    if not isinstance(grader, Mapping) or not isinstance(grader.get("type"), str):
        return grader
    settings = {key: value for key, value in grader.items() if key not in ("type", "name")}
    members = settings.get("graders")
    if isinstance(members, Mapping):
        settings["graders"] = {name: named(member) for name, member in members.items()}
    return settings | {"name": grader["type"], "label": grader.get("name", "")}


class Params(plugins.Params):
    grader: Annotated[plugins.choice("metrics"), BeforeValidator(named)] = Field(  # type: ignore[valid-type]
        description="the score that is the reward; OpenAI's form {type, name, …} is taken too"
    )
    group: int = Field(default=8, ge=2, le=256, description="answers sampled for each prompt")
    max_new_tokens: int = Field(default=256, ge=1, le=16384, description="of an answer while training")
    temperature: float = Field(
        default=1.0, gt=0, le=4, description="of sampling, and of the policy that learns"
    )
    iterations: int = Field(default=1, ge=1, le=64, description="optimiser steps on one sampling")
    clip: float = Field(default=0.2, gt=0, lt=1, description="how far below 1 a ratio still counts")
    clip_high: float | None = Field(default=None, gt=0, description="and above; default: as far as below")
    beta: float = Field(default=0.0, ge=0, description="weight of the KL divergence to the base")
    scale: Literal["none", "std"] = Field(default="none", description="what divides advantages")
    normalise: Literal["constant", "answers", "tokens"] = "constant"


def advantage(rewards_P_G: Tensor, params: Params) -> Tensor:
    """How much better each answer is than its group's mean; 0 throughout a group of equal rewards."""
    centred_P_G = rewards_P_G - rewards_P_G.mean(dim=1, keepdim=True)
    same_P_1 = (rewards_P_G == rewards_P_G[:, :1]).all(dim=1, keepdim=True)
    if params.scale == "std":
        centred_P_G = centred_P_G / (rewards_P_G.std(dim=1, keepdim=True) + LEAST_STD)
    return centred_P_G.masked_fill(same_P_1, 0.0)


def loss(policy: Tensor, reference: Tensor | None, batch: Batch, params: Params) -> Loss:
    """The clipped loss of the answers' tokens (`policy` is logp_N at the sampling temperature), as a sum."""
    import torch

    assert batch.advantages_D is not None  # what needs rollouts is given them
    advantages_N = batch.advantages_D[batch.rows_N]
    old_N = policy.detach() if batch.behaviour_N is None else batch.behaviour_N
    ratio_N = torch.exp(policy - old_N)
    high = params.clip if params.clip_high is None else params.clip_high
    bounded_N = ratio_N.clamp(1 - params.clip, 1 + high)
    loss_N = -torch.minimum(ratio_N * advantages_N, bounded_N * advantages_N)
    kl_N = torch.zeros_like(policy)
    if reference is not None:
        ahead_N = reference - policy
        kl_N = torch.exp(ahead_N) - ahead_N - 1
        loss_N = loss_N + params.beta * kl_N
    lengths_D = torch.bincount(batch.rows_N, minlength=len(batch.lengths_D)).clamp(min=1)
    share_N = torch.ones_like(policy) if params.normalise == "tokens" else 1.0 / lengths_D[batch.rows_N]
    weight_N = share_N if params.normalise != "constant" else 1.0 / params.max_new_tokens
    with torch.no_grad():
        cut_N = (ratio_N * advantages_N > bounded_N * advantages_N).to(policy.dtype)
        metrics = {"clipped": float((cut_N * share_N).sum()), "kl": float((kl_N * share_N).sum())}
    count = policy.numel() if params.normalise == "tokens" else len(batch.lengths_D)
    return Loss(total=(loss_N * weight_N).sum(), count=count, metrics=metrics)


def informative(advantages_G: Sequence[float]) -> bool:
    """Whether a group teaches anything: some answer is better than another."""
    return any(value != 0.0 for value in advantages_G)
