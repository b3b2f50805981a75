"""What attention on a GPU rests on, as far as a CPU can show it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from luthier.engine import attention, batch, head, varlen
from luthier.engine.attention import How
from luthier.engine.documents import Documents
from luthier.engine.native import kernels
from luthier.template import Encoded
from tests.engine.tiny_families import FAMILIES, make

CPU = torch.device("cpu")


def drawn(tokens: int, heads: int, kv_heads: int, width: int = 8) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(3)
    return [
        torch.randn(tokens, count, width, generator=noise).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("shape", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [((7, 1, 5, 5), ()), ((6, 3, 4, 8, 2), (-1, 0, 0, -1, 2)), ((9,), ())],
    ids=["documents", "shared", "one"],
)
def test_attention_by_document_is_the_engines_own(
    lengths: tuple[int, ...], parents: tuple[int, ...], shape: tuple[int, int], window: int | None
) -> None:
    q, k, v = inputs = drawn(sum(lengths), *shape)
    turn = tuple(torch.randn(sum(lengths), 8, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    documents, how = Documents.of(lengths, parents), How(window, 0.3)
    found = attention._one_by_one((q, k, v), turn, documents, how)  # on a CPU it goes by document
    expected = attention.over_documents((q, k, v), turn, documents, how)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.linspace(-1, 1, found.numel()).view_as(found)
    got = torch.autograd.grad((found * upstream).sum(), inputs)
    want = torch.autograd.grad((expected * upstream).sum(), inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_has_the_same_log_probabilities_by_the_gpus_path(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(FAMILIES[family]())
    rows = [Encoded(tuple(range(1, n + 1)), tuple(at > 2 for at in range(n)), f"r{n}") for n in (9, 7, 7, 4)]
    packed = batch.collate(rows, block=2)  # they begin alike, so they share
    assert packed.parents_S
    expected = head.batch_logps(model, packed)
    monkeypatch.setattr(attention, "over_documents", attention._one_by_one)
    torch.testing.assert_close(head.batch_logps(model, packed), expected, rtol=1e-5, atol=1e-5)


def test_the_layout_of_a_batch_is_built_once() -> None:
    varlen.layout.cache_clear()
    model = make(FAMILIES["llama"]())
    documents = Documents.of((5, 3), (-1, 0))
    q, k, v = drawn(8, 4, 2)
    for _ in range(model.config.num_hidden_layers):
        attention._one_by_one((q, k, v), None, documents, How(None, 0.3))
    assert varlen.layout.cache_info().misses == 1


def test_a_layout_names_each_documents_keys_and_ends() -> None:
    laid = varlen.layout((3, 2, 1, 4), (-1, 0, 1, -1), CPU)
    assert laid.ends_q.tolist() == [0, 3, 5, 6, 10] and laid.ends_q.dtype is torch.int32
    assert laid.ends_k.tolist() == [0, 3, 8, 14, 18]
    assert laid.keys_K is not None
    assert laid.keys_K.tolist() == [0, 1, 2, *range(5), *range(6), *range(6, 10)]
    assert laid.longest == (4, 6)
    apart = varlen.layout((3, 2), (-1, -1), CPU)
    assert apart.keys_K is None and apart.ends_k is apart.ends_q


def test_a_kernel_is_trusted_only_if_it_gives_the_right_answer() -> None:
    def lined_up_left(qkv: Any, laid: varlen.Layout, sight: varlen.Sight) -> torch.Tensor:
        """The mistake to be feared: the causal mask begins at the first key, not the path's end."""
        q, k, v = qkv
        parts, at_q, at_k = [], 0, 0
        for queries, keys in laid.lengths:
            alone = replace(laid, lengths=((queries, queries),))
            some = q[at_q : at_q + queries], k[at_k : at_k + queries], v[at_k : at_k + queries]
            parts.append(varlen.by_document(some, alone, sight))
            at_q, at_k = at_q + queries, at_k + keys
        return torch.cat(parts)

    def not_here(*_: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available for this device")

    def windowless(qkv: Any, laid: varlen.Layout, sight: varlen.Sight) -> torch.Tensor:
        return varlen.by_document(qkv, laid, replace(sight, window=None))

    assert varlen._right(varlen.by_document, CPU, torch.bfloat16, 16)
    for wrong in (lined_up_left, not_here, windowless):
        assert not varlen._right(wrong, CPU, torch.bfloat16, 16)


def test_a_cpu_goes_by_document() -> None:
    name, run = varlen.kernel(CPU, torch.bfloat16, 64)
    assert run is varlen.by_document and "scaled_dot_product_attention" in name


def test_turning_sends_back_what_autograd_would() -> None:
    x, _, _ = drawn(6, 2, 1)
    cos, sin = (torch.rand(6, 8, generator=torch.Generator().manual_seed(n)) for n in (4, 5))
    formulas = kernels(compiled=False)
    found = varlen.turned(x, (cos, sin), (formulas.turn, formulas.unturn))
    expected = formulas.turn(x, cos, sin)
    assert torch.equal(found, expected)
    upstream = torch.linspace(-1, 1, found.numel()).view_as(found)
    torch.testing.assert_close(
        *(torch.autograd.grad((one * upstream).sum(), x)[0] for one in (found, expected))
    )
