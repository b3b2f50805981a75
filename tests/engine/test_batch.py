"""What a step reads, and how it is laid out."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from luthier.engine import batch
from luthier.template import Encoded

IDS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=30)


@given(ids=IDS, seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
def test_an_epoch_is_a_permutation_and_the_same_every_time(ids: list[str], seed: int, epoch: int) -> None:
    order = batch.order(tuple(ids), seed, epoch)
    batch.order.cache_clear()
    assert sorted(order) == list(range(len(ids)))
    assert batch.order(tuple(ids), seed, epoch) == order


def test_epochs_and_seeds_differ() -> None:
    ids = tuple(str(n) for n in range(50))
    assert len({batch.order(ids, seed, epoch) for seed in (1, 2) for epoch in (0, 1)}) == 4


@given(ids=st.lists(st.text(min_size=1, max_size=4), min_size=2, max_size=30, unique=True))
def test_a_new_row_does_not_shuffle_the_others(ids: list[str]) -> None:
    fewer, all_ = tuple(ids[:-1]), tuple(ids)
    with_it = [row for row in batch.order(all_, 3, 0) if row != len(ids) - 1]
    assert tuple(with_it) == batch.order(fewer, 3, 0)


@given(count=st.integers(1, 20), size=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_epoch_reads_every_row_once_whatever_the_batch(count: int, size: int, seed: int) -> None:
    ids = tuple(str(n) for n in range(count))
    read = [row for step in range(1, 2 * count + 1) for row in batch.rows_of(ids, size, seed, step)]
    for start in range(0, len(read) - count + 1, count):
        assert sorted(read[start : start + count]) == list(range(count))
    assert set(batch.Loader.needed(ids, size, seed, 2 * count)) == set(read)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), budget=st.integers(1, 120))
def test_packing_keeps_every_row_once_and_within_the_budget(lengths: list[int], budget: int) -> None:
    bins = batch.pack(lengths, budget)
    assert Counter(row for bin_ in bins for row in bin_) == Counter(range(len(lengths)))
    for bin_ in bins:
        assert sum(lengths[row] for row in bin_) <= budget or len(bin_) == 1
        assert [lengths[row] for row in bin_] == sorted((lengths[row] for row in bin_), reverse=True)
    assert bins == batch.pack(lengths, budget)


def test_a_batch_predicts_each_learnt_token_from_the_place_before_it() -> None:
    rows = [
        Encoded((5, 6, 7, 8), (False, False, True, True), "a"),
        Encoded((9, 10), (True, True), "b"),  # nothing predicts 9
    ]
    made = batch.collate(rows)
    assert made.ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert made.positions_T.tolist() == [0, 1, 2, 3, 0, 1]
    assert made.lengths_D == (4, 2)
    assert made.places_N.tolist() == [1, 2, 4]
    assert made.targets_N.tolist() == [7, 8, 10]
    assert made.rows_N.tolist() == [0, 0, 1]
    assert made.rows == ("a", "b")


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=8), budget=st.integers(2, 40))
def test_no_token_is_padding(lengths: list[int], budget: int) -> None:
    rows = [Encoded((at, *range(n - 1)), (True,) * n, str(at)) for at, n in enumerate(lengths)]
    micros = batch.micro_batches(rows, budget)
    assert sum(len(micro.ids_T) for micro in micros) == sum(lengths)
    assert all(sum(micro.lengths_D) == len(micro.ids_T) for micro in micros)
    assert sorted(row for micro in micros for row in micro.rows) == sorted(row.id for row in rows)


PAIRS = st.lists(
    st.tuples(*(st.lists(st.integers(1, 3), min_size=1, max_size=12) for _ in range(3))),
    min_size=1,
    max_size=8,
)


@given(pairs=PAIRS, budget=st.integers(1, 60))
def test_the_documents_of_a_row_stay_together_in_order_whatever_the_budget(
    pairs: list[tuple[list[int], ...]], budget: int
) -> None:
    rows = [
        tuple(Encoded((*asked, *said), (False,) * len(asked) + (True,) * len(said), str(number), part)
              for part, said in enumerate(sides))
        for number, (asked, *sides) in enumerate(pairs)
    ]  # fmt: skip
    documents = batch.flat(rows)
    micros = batch.micro_batches(documents, budget)
    assert batch.sizes(documents, budget) == tuple(len(micro.ids_T) for micro in micros)
    for micro in micros:
        assert micro.parts_D == (0, 1) * (len(micro.rows) // 2)
        assert micro.rows[::2] == micro.rows[1::2]
        assert len(micro.ids_T) <= budget or len(micro.rows) == 2
    assert sorted(row for micro in micros for row in micro.rows[::2]) == sorted(row[0].id for row in rows)
