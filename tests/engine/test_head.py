"""`token_logps` is the plain log softmax, whatever the tile; `prove` knows which models it may trust."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CohereConfig, GraniteConfig

from luthier.engine import base
from luthier.engine.head import token_logps, token_scores
from luthier.errors import ModelError
from tests.engine.test_attention import rows
from tests.engine.tiny_families import FAMILIES, SMALL, make


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(2, 30), st.integers(1, 9)),
    tile=st.integers(1, 13),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_token_logps_equals_log_softmax_and_its_gradients(
    shape: tuple[int, int, int], tile: int, seed: int, scale: float
) -> None:
    n, vocabulary, width = shape
    noise = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, width, generator=noise) * scale).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=noise).requires_grad_()
    targets = torch.randint(vocabulary, (n,), generator=noise)
    upstream = torch.randn(n, generator=noise)
    found = token_logps(hidden, weight, targets, tile)
    expected = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * max(1.0, scale))
    got = torch.autograd.grad((found * upstream).sum(), (hidden, weight))
    want = torch.autograd.grad((expected * upstream).sum(), (hidden, weight))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6 * max(1.0, scale))


def test_no_token_gives_no_log_probability() -> None:
    hidden = torch.zeros(0, 4, requires_grad=True)
    found = token_logps(hidden, torch.ones(7, 4), torch.zeros(0, dtype=torch.long))
    found.sum().backward()
    assert found.shape == (0,) and hidden.grad is not None


def test_log_probabilities_are_float32_on_a_bfloat16_model() -> None:
    found = token_logps(torch.ones(3, 4).bfloat16(), torch.ones(5, 4).bfloat16(), torch.tensor([0, 1, 2]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((3,), -torch.log(torch.tensor(5.0)).item()))


@pytest.mark.parametrize("tile", [1, 3, 100])
def test_a_target_is_right_where_no_token_is_likelier(tile: int) -> None:
    noise = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(40, 6, generator=noise), torch.randn(9, 6, generator=noise)
    best = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.arange(40) % 3 == 0, best, (best + 1) % 9)
    found = token_scores(hidden, weight, targets, tile)
    assert found.right_N.tolist() == [n % 3 == 0 for n in range(40)]
    assert torch.equal(found.logp_N, token_logps(hidden, weight, targets, tile))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_known_family_is_proved(family: str) -> None:
    assert base.prove(make(FAMILIES[family]()), rows((12, 7))) < 1e-4


@pytest.mark.parametrize(
    "config", [GraniteConfig(**SMALL, logits_scaling=8.0), CohereConfig(**SMALL, logit_scale=0.0625)]
)
def test_a_model_that_scales_its_logits_is_refused(config: object) -> None:
    with pytest.raises(ModelError, match="own log-probabilities"):
        base.prove(make(config), rows((12, 7)))
