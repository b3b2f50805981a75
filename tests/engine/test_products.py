"""Products in C++, for CPUs with bfloat16 and no matrix unit: right, with any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine import kernels as plain
from luthier.engine import native
from luthier.engine.native import kernels

pytestmark = pytest.mark.skipif(
    not (native.can_compile() and native.multiplies()),
    reason="this CPU does not multiply bfloat16, or has a matrix unit: torch multiplies here",
)
SIZES = st.integers(1, 70)


def drawn(seed: int, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=noise).bfloat16() for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), SIZES, SIZES, SIZES, SIZES, st.booleans(), st.booleans())
def test_a_sum_of_products_is_float32s_rounded_once(
    seed: int, rows: int, depth: int, columns: int, rank: int, across: bool, turned: bool
) -> None:
    x, w, y, v = drawn(seed, (rows, depth), (depth, columns), (rows, rank), (rank, columns))
    if across:  # the same matrices, laid in memory the other way round
        w, v = w.T.contiguous().T, v.T.contiguous().T
    if turned:
        x, y = x.T.contiguous().T, y.T.contiguous().T
    total = kernels(compiled=True).total
    for more in (None, (y, v)):
        exact = x.double() @ w.double() + (0 if more is None else y.double() @ v.double())
        found = total(x, w, more)
        assert found.dtype is torch.bfloat16 and found.is_contiguous()
        assert (found.double() - exact).abs().max() <= 2**-8 * exact.abs().max() + 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(1, 600), SIZES, st.integers(1, 300))
def test_a_sum_of_outer_products_is_float32s(seed: int, tokens: int, rank: int, columns: int) -> None:
    wide_x, wide_y = drawn(seed, (tokens, rank + 20), (tokens, columns + 20))
    wide_x[:, rank:] = wide_y[:, columns:] = torch.nan  # neighbours in memory
    x, y = wide_x[:, :rank], wide_y[:, :columns]
    exact = x.double().T @ y.double()
    found = kernels(compiled=True).outer(x, y)
    assert found.dtype is torch.float32 and found.is_contiguous()
    assert (found.double() - exact).abs().max() <= 1e-5 * exact.abs().max() + 1e-6


def test_parts_of_larger_matrices_are_multiplied_where_they_lie() -> None:
    x, w = drawn(0, (40, 64), (96, 64))
    part = x[:, 7:40]
    found = kernels(compiled=True).total(part, w[10:50, 7:40].T)
    assert torch.equal(found, kernels(compiled=True).total(part.contiguous(), w[10:50, 7:40].T.contiguous()))


def test_what_lies_around_a_matrix_never_gets_into_a_sum() -> None:
    wide = torch.full((20, 40), torch.nan, dtype=torch.bfloat16)
    wide[:15, :31] = drawn(1, (15, 31))[0]
    x = wide[:15, :31]
    for w in (x.T, x.contiguous().T, x.T.contiguous()):
        assert torch.isfinite(kernels(compiled=True).total(x, w)).all()
    assert torch.isfinite(kernels(compiled=True).total(x.T, x)).all()


def test_bits_do_not_depend_on_threads_or_on_other_rows() -> None:
    x, w, y, v = drawn(2, (333, 576), (576, 200), (333, 16), (16, 200))
    total, outer, threads = (
        kernels(compiled=True).total,
        kernels(compiled=True).outer,
        torch.get_num_threads(),
    )
    whole, thin = total(x, w, (y, v)), outer(y, x)
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(total(x, w, (y, v)), whole) and torch.equal(outer(y, x), thin)
    finally:
        torch.set_num_threads(threads)
    some = slice(100, 107)
    assert torch.equal(total(x[some], w, (y[some], v)), whole[some])


def test_neither_product_is_rounded_before_their_sum() -> None:
    x, w = (
        torch.tensor([[1, 2**-8]]).bfloat16(),
        torch.ones(2, 1).bfloat16(),
    )  # 1 + 2^-8 would be rounded to 1
    y, v = torch.tensor([[2.0**-9]]).bfloat16(), torch.ones(1, 1).bfloat16()
    assert float(kernels(compiled=True).total(x, w, (y, v))) == 1 + 2**-7


def test_other_kinds_of_numbers_are_torchs_work() -> None:
    x, w = (one.float() for one in drawn(3, (9, 8), (8, 7)))
    assert torch.equal(kernels(compiled=True).total(x, w), plain.total(x, w))
    assert torch.equal(kernels(compiled=True).outer(x, x), plain.outer(x, x))
