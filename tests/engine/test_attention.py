"""Packed is unpacked: no document sees another, in any family, in logits and in gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, GptOssConfig

from luthier.engine import attention, base, batch, head
from luthier.engine.attention import Documents
from luthier.errors import ModelError
from luthier.template import Encoded
from tests.engine.tiny_families import FAMILIES, SMALL, make


def rows(lengths: tuple[int, ...], seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    return [
        Encoded(tuple(draw.randrange(1, 97) for _ in range(n)), tuple(at >= n // 3 for at in range(n)), f"r{n}")
        for n in lengths
    ]


def packed(model: Any, documents: list[Encoded]) -> torch.Tensor:
    return head.batch_logps(model, batch.collate(documents))


def alone(model: Any, documents: list[Encoded]) -> torch.Tensor:
    model.set_attn_implementation("eager")
    found = torch.cat([base._plain_logps(model, batch.collate([row])) for row in documents])
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return found


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_log_probabilities_and_gradients_are_the_unpacked_ones(family: str) -> None:
    model, documents = make(FAMILIES[family]()), rows((17, 9, 9, 9, 4, 2))
    found, expected = packed(model, documents), alone(model, documents)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    alone(model, documents).sum().backward()
    for name, weight in model.named_parameters():
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-5, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_document_does_not_see_its_neighbours(family: str) -> None:
    model, documents = make(FAMILIES[family]()), rows((9, 9, 5))
    other = [rows((9,), seed=7)[0], *documents[1:]]
    own = batch.collate(documents[:1]).targets_N.numel()
    with torch.no_grad():
        assert torch.equal(packed(model, documents)[own:], packed(model, other)[own:])


def test_the_order_of_documents_changes_nothing_but_the_order() -> None:
    model, documents = make(FAMILIES["llama"]()), rows((8, 5, 3))
    backwards = packed(model, documents[::-1]).split([len(packed(model, [row])) for row in documents[::-1]])
    torch.testing.assert_close(torch.cat(backwards[::-1]), packed(model, documents), rtol=1e-5, atol=1e-6)


def test_equal_lengths_are_one_group() -> None:
    assert Documents.of((7, 4, 4, 4, 2)).groups == ((0, 1, 7), (7, 3, 4), (19, 1, 2))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (Gemma2Config(**SMALL, head_dim=8), "softcap"),
        (GptOssConfig(**SMALL, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
    ],
)
def test_attention_it_does_not_know_is_refused_by_name(config: Any, word: str) -> None:
    with pytest.raises(ModelError, match=word):
        packed(make(config), rows((5,)))


def test_a_call_without_documents_is_refused() -> None:
    with pytest.raises(ModelError, match="documents"):
        make(FAMILIES["llama"]())(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_no_mask_is_ever_built_for_packed_rows() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    assert attention.IMPLEMENTATION not in ALL_MASK_ATTENTION_FUNCTIONS
