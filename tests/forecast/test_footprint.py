"""Bytes by kind come from the shapes and from the micro-batches that will really come."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.engine import attention, batch, documents, flash, head, native
from luthier.forecast import fit, footprint, layout
from luthier.forecast.footprint import Checkpointing, How, Load, Stack
from luthier.forecast.layout import Layout
from luthier.template import Encoded
from tests.engine.tiny_families import FAMILIES
from tests.forecast.test_flops import adapted, rows

STACKS = (
    Stack(64, 128, ((4, 64), (4, 32))), Stack(64, 64, ((4, 64),), False), Stack(64, 256, ((4, 128),)),
    Stack(128, 64, (), False),
)  # fmt: skip
SHAPE = footprint.Shape(2, 64, 4, 2, 16, 128, 300, 100_000, 1000, 2, STACKS)


def alone(tokens: int) -> Layout:
    pairs = tokens * tokens
    return Layout(
        tokens, 64, tokens, pairs, pairs if tokens <= documents.SHORT else 0, (pairs, tokens), False, tokens
    )


def test_a_forecast_is_the_sum_of_its_kinds() -> None:
    found = footprint.forecast(SHAPE, Load((alone(100),)), How())
    assert found.total == sum(asdict(found).values()) == found.as_dict()["total"]
    assert found.weights == 200_000 and found.adapters == 4000 and found.optimiser == 8000
    assert found.bits(SHAPE.parameters)["weights"] == 16


@given(tokens=st.integers(300, 10_000), more=st.integers(1, 1000), trainable=st.integers(1, 10**7))
def test_more_tokens_layers_or_weights_never_take_less(tokens: int, more: int, trainable: int) -> None:
    shape = replace(SHAPE, trainable=trainable)
    least = footprint.forecast(shape, Load((alone(tokens),)), How()).total
    assert footprint.forecast(shape, Load((alone(tokens + more),)), How()).total > least
    assert (
        footprint.forecast(replace(shape, trainable=trainable + more), Load((alone(tokens),)), How()).total
        > least
    )
    assert footprint.forecast(replace(shape, layers=3), Load((alone(tokens),)), How()).total > least


def test_computing_more_again_keeps_less() -> None:
    deep = replace(SHAPE, layers=12)
    kept = [
        footprint.forecast(deep, Load((alone(1000),)), How(checkpointing=kind)).activations
        for kind in Checkpointing
    ]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3


def test_a_look_at_many_learnt_tokens_under_a_large_vocabulary_may_be_the_peak() -> None:
    wide, at = replace(SHAPE, vocabulary=200_000), replace(alone(100), loss_tokens=4)
    alone_ = footprint.forecast(wide, Load((at,)), How())
    looked = footprint.forecast(wide, Load((at,), (replace(at, loss_tokens=256),)), How())
    assert looked.activations + looked.head == footprint.looking_bytes(
        wide, replace(at, loss_tokens=256), How()
    )
    assert looked.total > alone_.total


def test_the_library_keeps_the_heads_products_alone_where_layers_have_their_own() -> None:
    met = [
        replace(alone(tokens), loss_tokens=learnt) for tokens, learnt in [(100, 20), (200, 20), (300, 300)]
    ]
    own, torchs = (footprint.products_bytes(SHAPE, How(flash=flash_), met) for flash_ in (True, False))
    assert own == footprint.PRODUCT_BYTES * 2 * len({20, 256, 300 - 256})
    assert torchs == footprint.PRODUCT_BYTES * 38 * len({100, 200, 300})
    assert footprint.products_bytes(replace(SHAPE, weight_bytes=4), How(), met) == 0


def test_a_heap_of_their_own_loses_nothing_of_what_tensors_leave() -> None:
    slacks = [
        footprint.forecast(SHAPE, Load((alone(tokens),)), How(heap=True)).slack for tokens in (300, 9000)
    ]
    assert slacks == [footprint.BESIDE_BYTES] * 2


def test_gradients_take_the_place_of_what_was_kept_where_a_step_is_one_micro_batch() -> None:
    shape = replace(SHAPE, trainable=10_000)
    one, more = (
        footprint.forecast(shape, Load((alone(500),), several=several), How(fragmentation=0))
        for several in (False, True)
    )
    assert more.activations - one.activations == one.gradients == 40_000


def test_a_trial_stands_for_what_was_assumed_and_no_forecast_is_below_its_peak() -> None:
    said = footprint.forecast(SHAPE, Load((alone(100),), row_tokens=1000), How())
    found = footprint.settled(said, resident=600_000_000, products=5, peak=0)
    assert (found.process, found.products, found.rows) == (600_000_000, 5, 0)
    assert found.total - said.total == 600_000_005 - said.process - said.products - said.rows
    high = footprint.settled(said, 600_000_000, 5, peak=10**9)
    assert high.total == 10**9 + said.optimiser + said.checkpoint


def test_a_mapped_base_counts_what_was_stacked_out_of_it_twice() -> None:
    mapped = footprint.weights_bytes(replace(SHAPE, mapped=True))
    assert mapped - footprint.weights_bytes(SHAPE) == 2 * 2 * (64 * 128 + 64 * 256)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_shape_is_read_from_any_family(family: str) -> None:
    _, shape = adapted(family, "all-linear", 2)
    assert (shape.layers, shape.width, shape.inner, shape.kv_heads, shape.vocabulary) == (2, 32, 48, 2, 97)
    wide = shape.queries + 2 * shape.keys
    assert [stack.outputs for stack in shape.stacks] == [wide, 32, 96, 32]
    assert shape.blocks == 2 * (32 * wide + shape.queries * 32 + 32 * 96 + 48 * 32)


@pytest.mark.parametrize(("lengths", "shared"), [([20, 9, 31], 0), ([40, 37, 50], 32), ([300, 20], 0)])
def test_a_layout_counts_what_the_real_batch_lays_out(lengths: list[int], shared: int) -> None:
    given = rows(lengths, shared)
    micro, at = batch.collate(given), layout.of(given)
    groups = documents.Documents.of(micro.lengths_S or micro.lengths_D, micro.parents_S).groups
    assert at.tokens == len(micro.ids_T) and at.loss_tokens == len(micro.targets_N)
    assert at.places == sum(group.documents * group.length for group in groups)
    pairs = [
        group.documents * (last - first) * (group.before + last)
        for group in groups
        for first, last in group.blocks
    ]
    assert at.pairs == sum(pairs) and at.widest[0] == max(pairs)


KEEPING = [
    ("llama", ["q_proj", "v_proj"]),
    ("qwen3", ["v_proj", "o_proj"]),
    *((family, "all-linear") for family in sorted(FAMILIES)),
]


@pytest.mark.parametrize(("family", "targets"), KEEPING, ids=str)
@pytest.mark.parametrize(
    ("lengths", "shared", "long"),
    [([20, 9, 31], 0, 2048), ([40, 37, 50], 32, 2048), ([300, 20], 0, 2048), ([300, 20], 0, 256)],
)
def test_what_a_layer_keeps_is_what_autograd_holds(
    family: str, targets: Any, lengths: list[int], shared: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shape = adapted(family, targets, 4)
    window = getattr(model.config, "sliding_window", None)
    if window and long < max(lengths):
        pytest.skip("a document that is longer than its window is not streamed, which a layout does not know")
    monkeypatch.setattr(attention, "LONG", long)  # longer documents are streamed
    _hold_against_autograd((model, shape), rows(lengths, shared), How(tile=0))


@pytest.mark.skipif(
    not (native.can_compile() and flash.knows(torch.float32, 16)),
    reason="this CPU has no AVX2, or no compiler",
)
@pytest.mark.parametrize(("family", "targets"), KEEPING, ids=str)
@pytest.mark.parametrize(
    ("lengths", "shared"), [([20, 9, 31], 0), ([40, 37, 50], 32), ([300, 20], 0), ([1300, 20], 0)]
)
def test_attention_in_one_piece_keeps_no_scores(
    family: str, targets: Any, lengths: list[int], shared: int
) -> None:
    model, shape = adapted(family, targets, 4, compiled=True)
    way = How(tile=0, compiled=True, flash=flash.knows(torch.float32, shape.head_width))
    _hold_against_autograd((model, shape), rows(lengths, shared), way)


def _hold_against_autograd(made: tuple[Any, footprint.Shape], given: list[Encoded], how: How) -> None:
    """What a micro-batch keeps, as the closed form says and as autograd does."""
    model, shape = made
    inside = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    held: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inside:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head.batch_logps(model, batch.collate(given))
    at = layout.of(given)
    activations, ends = footprint.moving_bytes(shape, at, how)
    passing = footprint.passing_bytes(shape, at, how)
    assert sum(held.values()) == pytest.approx(activations + ends - passing, rel=0.02)


def test_the_largest_number_that_fits_is_found() -> None:
    assert fit.most(lambda n: n <= 37, 1, 100) == 37
    assert fit.most(lambda n: n <= 370, 1, 100) == 100
    assert fit.most(lambda n: n > 1000, 1, 100) is None


def test_budgets_end_at_the_longest_row_alone() -> None:
    assert list(fit.budgets(2048, 300)) == [2048, 1024, 512, 300]
    assert list(fit.budgets(2048, 3000)) == [3000]
