"""Attention in C++ from end to end: that of `engine.attention` in products, whatever the packing."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.engine import attention, flash, native, units
from luthier.engine.attention import How
from luthier.engine.documents import Documents
from luthier.engine.kernels import PLAIN

KINDS = [
    dtype for dtype in (torch.float32, torch.bfloat16) if native.can_compile() and flash.knows(dtype, 64)
]
pytestmark = pytest.mark.skipif(not KINDS, reason="this CPU has no instructions that engine/flash.cpp knows")
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 2e-2}  # of the largest number, or of 1
TREES = st.lists(st.tuples(st.integers(1, 90), st.integers(-3, 9)), min_size=1, max_size=7)


def laid(tree: list[tuple[int, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and parents as `engine.trie` gives them: a parent comes before its children."""
    lengths = tuple(length for length, _ in tree)
    parents = [min(parent, number - 1) if parent > -1 else -1 for number, (_, parent) in enumerate(tree)]
    return lengths, tuple(parents)


def drawn(tokens: int, heads: tuple[int, int], width: int, seed: int) -> list[Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, width, generator=noise) for n in (heads[0], heads[1], heads[1], heads[0])]


def tables(tokens: int, turned: int, seed: int) -> tuple[Tensor, Tensor]:
    angles = 6 * torch.rand(tokens, turned // 2, generator=torch.Generator().manual_seed(seed))
    return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


def answers(qkv: list[Tensor], grad: Tensor, at: tuple[flash.Turn | None, Documents, How]) -> list[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    out = attention.over_documents((q, k, v), *at)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


def close(found: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> bool:
    return all(
        float((one.float() - other.float()).abs().max())
        <= ROUNDING[dtype] * max(1.0, float(other.float().abs().max()))
        for one, other in zip(found, exact, strict=True)
    )


@pytest.fixture(params=["", "-mno-avx512f"], ids=["own instructions", "AVX2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What this CPU is used for, and as if it had no AVX-512."""
    if request.param:
        if "avx512f" not in native.cpu_flags():
            pytest.skip("this CPU has no AVX-512 to leave out")

        def library(dtype: torch.dtype) -> ctypes.CDLL:
            return native.build(flash.SOURCE, f"-DNUMBER={flash.NUMBERS[dtype]}", request.param)

        monkeypatch.setattr(flash, "_library", library)
    yield request.param


@settings(max_examples=40, deadline=None)
@given(
    TREES, st.sampled_from([(1, 1), (4, 2), (3, 1), (5, 5)]), st.sampled_from([16, 48, 64]),
    st.sampled_from([None, 1, 7, 40]), st.sampled_from([None, 16, 8]), st.integers(0, 9),
)  # fmt: skip
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_it_is_attention_in_products(
    dtype: torch.dtype, tree: list[tuple[int, int]], heads: tuple[int, int], width: int,
    window: int | None, turned: int | None, seed: int,
) -> None:  # fmt: skip
    _compare(dtype, laid(tree), heads, width, window, turned, seed)


@pytest.mark.parametrize("window", [None, 700])
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [((1100,), ()), ((2500, 40), (-1, 0)), ((30, 1500), (-1, 0)), ((600, 9), (-1, -1))],
)
def test_documents_of_several_stretches_and_pieces_of_keys_are_no_exception(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, instructions: str
) -> None:
    _compare(torch.float32, (lengths, parents), (2, 1), 32, window, 32, 3)


def test_the_other_instructions_give_the_same(instructions: str) -> None:
    for lengths, parents in (((5, 33, 12), ()), ((40, 17, 70, 3), (-1, 0, 0, 2))):
        for width in (16, 48, 64, 80):
            _compare(torch.float32, (lengths, parents), (6, 2), width, 20, None, 5)


def _compare(
    dtype: torch.dtype, packed: tuple[tuple[int, ...], tuple[int, ...]], heads: tuple[int, int], width: int,
    window: int | None, turned: int | None, seed: int,
) -> None:  # fmt: skip
    documents = Documents.of(*packed)
    *qkv, grad = (x.to(dtype) for x in drawn(documents.tokens, heads, width, seed))
    turn = None if turned is None else tables(documents.tokens, turned, seed)
    narrow = None if turn is None else (turn[0].to(dtype), turn[1].to(dtype))
    wide = None if narrow is None else (narrow[0].float(), narrow[1].float())
    own = How(window, width**-0.5, formulas=native.kernels(compiled=True))
    found = answers(qkv, grad, (narrow, documents, own))
    exact = answers(
        [x.float() for x in qkv], grad.float(), (wide, documents, How(window, width**-0.5, formulas=PLAIN))
    )
    assert all(x.dtype is dtype for x in found)
    assert close(found, exact, dtype)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_bits_do_not_depend_on_threads_or_on_who_else_is_in_the_batch(dtype: torch.dtype) -> None:
    how, threads = How(None, 0.2, formulas=native.kernels(compiled=True)), torch.get_num_threads()
    *qkv, grad = (x.to(dtype) for x in drawn(900, (4, 2), 32, 1))
    whole = answers(qkv, grad, (None, Documents.of([300, 400, 200]), how))
    try:
        torch.set_num_threads(2)
        assert all(map(torch.equal, answers(qkv, grad, (None, Documents.of([300, 400, 200]), how)), whole))
    finally:
        torch.set_num_threads(threads)
    alone = answers([x[300:700] for x in qkv], grad[300:700], (None, Documents.of([400]), how))
    assert all(torch.equal(one, other[300:700]) for one, other in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_a_document_takes_nothing_from_its_neighbours_not_even_what_is_no_number(dtype: torch.dtype) -> None:
    how, documents = How(None, 0.2, formulas=native.kernels(compiled=True)), Documents.of([37, 50, 21])
    *qkv, grad = (x.to(dtype) for x in drawn(108, (3, 1), 16, 2))
    for x in (*qkv, grad):
        x[:37], x[87:] = torch.nan, torch.inf
    for x in answers(qkv, grad, (None, documents, how)):
        assert torch.isfinite(x[37:87]).all()


def test_queries_keys_and_values_may_be_parts_of_one_product() -> None:
    how, documents = How(None, 0.2, formulas=native.kernels(compiled=True)), Documents.of([30, 20])
    wide = torch.randn(50, 8, 16, generator=torch.Generator().manual_seed(0))
    parts, grad = [wide[:, :4], wide[:, 4:6], wide[:, 6:]], torch.ones(50, 4, 16)

    def through(qkv: list[Tensor]) -> Tensor:
        return attention.over_documents((qkv[0], qkv[1], qkv[2]), None, documents, how)

    assert torch.equal(through(parts), through([x.contiguous() for x in parts]))
    assert torch.equal(
        through([x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]), through(parts)
    )
    assert grad.shape == through(parts).shape


def test_what_it_does_not_know_goes_the_other_way() -> None:
    q = torch.zeros(4, 2, 24)
    assert not flash.takes(q, None) and not flash.takes(q[:, :, :16].double(), None)
    narrow = torch.zeros(4, 2, 16)
    assert flash.takes(narrow, None)
    assert not flash.takes(narrow, (torch.zeros(4, 16).double(), torch.zeros(4, 16).double()))


@given(TREES, st.integers(0, 3))
def test_every_query_is_in_one_unit_and_every_key_is_owed_by_all_who_see_it(
    tree: list[tuple[int, int]], long: int
) -> None:
    lengths, parents = laid(
        [(length * (60 if number == long else 1), at) for number, (length, at) in enumerate(tree)]
    )
    found = units.of(lengths, parents)
    assert found.slots == units.slots(lengths, parents)
    starts = (0, *accumulate(lengths))
    asked = [0] * sum(lengths)
    seen = [[0] * length for length in lengths]  # by how many units
    for first_path, end_path, first, end, before, _ in found.units.tolist():
        path = found.path[first_path:end_path].tolist()
        assert before == sum(tokens for _, tokens in path)
        for key, query, count, _ in found.pieces[first:end].tolist():
            number = starts.index(key)
            upward = []
            while (number := parents[number]) >= 0:
                upward.append([starts[number], lengths[number]])
            assert path == upward[::-1]
            asked[query : query + count] = [x + 1 for x in asked[query : query + count]]
            for at in range(query + count - key):
                seen[starts.index(key)][at] += 1
        for start, tokens in path:
            seen[starts.index(start)][:tokens] = [x + 1 for x in seen[starts.index(start)][:tokens]]
    assert asked == [1] * sum(lengths)
    taken: list[tuple[int, int]] = []
    for number, (start, length, first, end) in enumerate(found.documents.tolist()):
        assert (start, length) == (starts[number], lengths[number])
        owed = found.owed[first:end].tolist()
        taken += owed
        assert [sum(at < keys for _, keys in owed) for at in range(length)] == seen[number]
    assert sum(keys for _, keys in taken) == found.slots
    assert all(
        one + keys <= other for (one, keys), (other, _) in zip(sorted(taken), sorted(taken)[1:], strict=False)
    )
