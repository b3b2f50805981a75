"""Packed is unpacked: no document sees another, in any family, in logits and in gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, GptOssConfig

from luthier.engine import attention, base, batch, head
from luthier.engine import documents as documents_
from luthier.engine.documents import Documents
from luthier.engine.kernels import Seen
from luthier.errors import ModelError
from luthier.template import Encoded
from tests.engine.tiny_families import FAMILIES, SMALL, make


def rows(lengths: tuple[int, ...], seed: int = 0) -> list[Encoded]:
    draw = random.Random(seed)
    return [
        Encoded(
            tuple(draw.randrange(1, 97) for _ in range(n)), tuple(at >= n // 3 for at in range(n)), f"r{n}"
        )
        for n in lengths
    ]


def packed(model: Any, documents: list[Encoded]) -> torch.Tensor:
    return head.batch_logps(model, batch.collate(documents))


def alone(model: Any, documents: list[Encoded]) -> torch.Tensor:
    model.set_attn_implementation("eager")
    found = torch.cat([base._plain_logps(model, batch.collate([row])) for row in documents])
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return found


@pytest.mark.parametrize(
    "lengths", [(17, 9, 9, 9, 4, 2), (270, 270, 258, 140, 100, 7)], ids=["short", "long"]
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_packed_log_probabilities_and_gradients_are_the_unpacked_ones(
    family: str, lengths: tuple[int, ...]
) -> None:
    model, documents = make(FAMILIES[family]()), rows(lengths)
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


def test_documents_of_like_length_attend_together() -> None:
    found = Documents.of((300, 300, 200, 120, 60, 59, 9))
    assert [(g.start, g.tokens, g.documents, g.length) for g in found.groups] == [
        (0, 600, 2, 300), (600, 320, 2, 200), (920, 119, 2, 60), (1039, 9, 1, 9)
    ]  # fmt: skip
    assert found.tokens == 1048


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_kept_recomputed_and_streamed_attention_are_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = make(FAMILIES[family]()), rows((17, 9, 9, 9, 4, 2))

    def learnt() -> dict[str, torch.Tensor]:
        model.zero_grad()
        packed(model, documents).sum().backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    kept = learnt()
    limits = (documents_, "SHORT", 0), (documents_, "QUERIES", 4), (attention, "LONG", 0)
    for limit in limits:  # everything is computed again, then in blocks, then streamed
        monkeypatch.setattr(*limit)
        for name, gradient in learnt().items():
            scale = float(kept[name].abs().max())
            torch.testing.assert_close(gradient, kept[name], rtol=1e-5, atol=2e-5 * scale, msg=name)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    shape=st.sampled_from([(4, 2), (3, 1), (2, 2)]),
    window=st.sampled_from([None, 1, 3, 50]),
    seed=st.integers(0, 999),
)
def test_attention_of_any_packing_is_attention_of_each_document(
    lengths: list[int], shape: tuple[int, int], window: int | None, seed: int
) -> None:
    (heads, kv_heads), total = shape, sum(lengths)
    noise = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(1, count, total, 8, generator=noise, dtype=torch.float64).requires_grad_()

    inputs = (draw(heads), draw(kv_heads), draw(kv_heads))
    upstream = torch.randn(1, total, heads, 8, generator=noise, dtype=torch.float64)
    module = torch.nn.Identity()
    module.is_causal = True  # type: ignore[assignment]
    found, _ = attention.attend(
        module, *inputs, None, documents=Documents.of(lengths), sliding_window=window, dropout=0.0
    )
    parts, start = [], 0
    for length in lengths:
        q, k, v = (x[:, :, start : start + length] for x in inputs)
        seen = ~Seen(length, 0, window).hidden(length)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        parts.append(out.transpose(1, 2))
        start += length
    expected = torch.cat(parts, dim=1)
    # Scores pass through float32, whatever the inputs are.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad((found * upstream).sum(), inputs)
    want = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


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
