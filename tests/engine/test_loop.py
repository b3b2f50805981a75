"""The loop descends exactly: schedules, splits, seeds, restarts, and rows it must not learn from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.engine import base, batch, loop
from luthier.errors import TrainError
from luthier.methods import lora
from luthier.objectives import Batch, Loss, sft
from luthier.template import Encoded
from tests.engine.test_attention import rows

OBJECTIVE: Any = partial(sft.loss, params=sft.Params())
SETTINGS = loop.Settings(steps=6, lr=1e-2, seed=3, warmup=0.2)
ROWS = rows((14, 11, 9, 9, 7, 5, 5, 4, 12, 6), seed=4)


def model_of(folder: Path, dropout: float = 0.0, seed: int = 1) -> Any:
    return lora.attach(base.load(folder, "float32"), lora.Params(r=4, dropout=dropout), seed)


def loader(micro_tokens: int = 1000, batch_rows: int = 5) -> batch.Loader:
    return batch.Loader(
        tuple(row.id for row in ROWS), {n: (row,) for n, row in enumerate(ROWS)}, batch_rows, micro_tokens, 3
    )


def run(
    folder: Path, micro_tokens: int = 1000, **how: Any
) -> tuple[list[loop.Step], dict[str, torch.Tensor]]:
    model = model_of(folder, **how)
    adam = loop.optimiser(model, SETTINGS)
    steps = list(loop.train(model, loader(micro_tokens), OBJECTIVE, adam, SETTINGS))
    return steps, loop.snapshot(model, adam)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@given(
    steps=st.integers(1, 300),
    warmup=st.floats(0, 0.99),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
)
def test_the_rate_rises_in_a_line_and_falls_as_named(steps: int, warmup: float, schedule: Any) -> None:
    settings = loop.Settings(steps=steps, lr=2.0, seed=0, warmup=warmup, schedule=schedule)
    warm = round(warmup * steps)
    rates = [loop.rate(step, settings) for step in range(1, steps + 1)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert rates[:warm] == pytest.approx([2.0 * (n + 1) / warm for n in range(warm)])
    assert all(one >= other for one, other in zip(rates[warm:], rates[warm + 1 :], strict=False))
    for n, rate in enumerate(rates[warm:], 1):
        share = n / (steps - warm + 1)
        closed = {"cosine": 1 + math.cos(math.pi * share), "linear": 2 * (1 - share), "constant": 2.0}
        assert rate == pytest.approx(closed[schedule])


def test_two_runs_with_one_seed_are_bit_equal_and_other_seeds_differ(tiny_base: Path) -> None:
    first, second, other = (run(tiny_base, dropout=0.2, seed=seed) for seed in (1, 1, 2))
    assert [step.loss for step in first[0]] == [step.loss for step in second[0]]
    assert same(first[1], second[1]) and not same(first[1], other[1])


def test_k_micro_batches_are_one_batch(tiny_base: Path) -> None:
    (whole, weights), (split, parts) = run(tiny_base), run(tiny_base, micro_tokens=14)
    assert len(loader(14)(1)) > 2
    assert [step.loss for step in split] == pytest.approx([step.loss for step in whole], rel=1e-6)
    assert [step.grad_norm for step in split] == pytest.approx([step.grad_norm for step in whole], rel=1e-5)
    for name, weight in weights.items():
        if name.startswith("weight:"):  # Adam divides by tiny moments, so weights agree a little less
            torch.testing.assert_close(parts[name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_training_learns_and_reports_its_rows(tiny_base: Path) -> None:
    steps, _ = run(tiny_base)
    assert steps[-1].loss < steps[0].loss
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    ids = [row.id for row in ROWS]
    assert sorted(steps[0].rows + steps[1].rows) == sorted(ids)  # two steps of five are an epoch of ten
    assert steps[0].tokens + steps[1].tokens == sum(len(row.ids) for row in ROWS)


def test_a_restart_from_a_snapshot_is_bit_identical(tiny_base: Path) -> None:
    steps, end = run(tiny_base, dropout=0.2)
    model = model_of(tiny_base, dropout=0.2)
    adam = loop.optimiser(model, SETTINGS)
    descent = loop.train(model, loader(), OBJECTIVE, adam, SETTINGS)
    for _ in range(3):
        next(descent)
    saved = loop.snapshot(model, adam)
    fresh = model_of(tiny_base, dropout=0.2, seed=99)  # a fresh start that the snapshot must undo
    torch.manual_seed(12345)
    adam = loop.optimiser(fresh, SETTINGS)
    loop.restore(fresh, adam, saved)
    rest = list(loop.train(fresh, loader(), OBJECTIVE, adam, SETTINGS, loop.Past(3)))
    assert [step.loss for step in rest] == [step.loss for step in steps[3:]]
    assert same(loop.snapshot(fresh, adam), end)


def test_a_snapshot_of_other_weights_is_refused(tiny_base: Path) -> None:
    _, end = run(tiny_base)
    end.pop(next(name for name in end if name.startswith("weight:")))
    with pytest.raises(TrainError, match="other weights"):
        loop.put_weights(model_of(tiny_base), end)


def test_training_leaves_the_global_generator_where_it_was(tiny_base: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(tiny_base, dropout=0.2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_label_behind_the_mask_does_not_move_the_loss(tiny_base: Path) -> None:
    row = ROWS[0]
    last = len(row.ids) - 1
    unlearnt = Encoded(row.ids, (*row.mask[:last], False), row.id)
    changed = Encoded((*row.ids[:last], 7), unlearnt.mask, row.id)
    model = model_of(tiny_base)
    totals = [loop.look(model, [batch.collate([some])], OBJECTIVE).loss for some in (unlearnt, changed)]
    assert totals[0] == totals[1]


def poisoned(kind: str) -> Callable[[torch.Tensor, torch.Tensor | None, Batch], Loss]:
    def loss(policy: torch.Tensor, reference: torch.Tensor | None, micro: Batch) -> Loss:
        total = -policy.sum()
        if kind == "loss":
            return Loss(total * math.nan, policy.numel())
        # finite here, infinite in its gradient
        return Loss(total + (policy.sum() * 0).sqrt(), policy.numel())

    return loss


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nan_is_named_with_its_rows_and_nothing_moves(tiny_base: Path, kind: str) -> None:
    model = model_of(tiny_base)
    adam = loop.optimiser(model, SETTINGS)
    before = loop.snapshot(model, adam)
    with pytest.raises(TrainError, match=kind) as caught:
        next(loop.train(model, loader(), poisoned(kind), adam, SETTINGS))
    assert all(row in str(caught.value) for row in batch_ids(1))
    assert same(loop.snapshot(model, adam), before)


def batch_ids(step: int) -> list[str]:
    made = loader()
    return [made.ids[row] for row in batch.rows_of(made.ids, made.batch, made.seed, step)]


def test_a_step_without_a_learnt_token_is_refused_by_row(tiny_base: Path) -> None:
    silent = batch.collate([Encoded((1, 2, 3), (False, False, False), "quiet")])
    model = model_of(tiny_base)
    with pytest.raises(TrainError, match="quiet"):
        next(loop.train(model, lambda step: (silent,), OBJECTIVE, loop.optimiser(model, SETTINGS), SETTINGS))


def test_a_silent_row_among_others_changes_nothing(tiny_base: Path) -> None:
    silent = Encoded((1, 2, 3), (False, False, False), "quiet")
    losses = []
    for some in ([ROWS[0]], [ROWS[0], silent]):
        model = model_of(tiny_base)
        micros = (batch.collate(some), batch.collate([silent]))
        step = next(
            loop.train(model, lambda _, m=micros: m, OBJECTIVE, loop.optimiser(model, SETTINGS), SETTINGS)  # type: ignore[misc]
        )
        losses.append(step.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_base_is_bit_identical_after_training(tiny_base: Path) -> None:
    model = model_of(tiny_base)
    before = {n: w.detach().clone() for n, w in model.named_parameters() if not w.requires_grad}
    list(loop.train(model, loader(), OBJECTIVE, loop.optimiser(model, SETTINGS), SETTINGS))
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], weight) for name, weight in before.items())


def test_clipping_bounds_the_step_but_reports_the_whole_norm(tiny_base: Path) -> None:
    tight = loop.Settings(steps=1, lr=1e-2, seed=3, clip=1e-3)
    model = model_of(tiny_base)
    step = next(loop.train(model, loader(), OBJECTIVE, loop.optimiser(model, tight), tight))
    norm = math.sqrt(sum(float(w.grad.square().sum()) for w in loop.trained(model).values()))  # type: ignore[union-attr]
    assert step.grad_norm > 1e-3 and norm == pytest.approx(1e-3, rel=1e-3)


def sometimes(sick: set[int], factor: float = math.nan, slope: bool = False) -> Any:
    """The loss, but wrong in the steps named (a step is one micro-batch): times a factor, or in its slope."""
    calls = [0]

    def loss(policy: torch.Tensor, reference: torch.Tensor | None, micro: Batch) -> Loss:
        calls[0] += 1
        found = OBJECTIVE(policy, reference, micro)
        if calls[0] not in sick:
            return found  # type: ignore[no-any-return]
        return replace(found, total=found.total * factor + (policy.sum() * 0).sqrt() * slope)

    return loss


SKIP = replace(SETTINGS, on_sick="skip", steps=14)


@pytest.mark.parametrize("how", ["loss", "gradient", "silent", "spike"])
def test_a_skipped_step_is_named_and_leaves_weights_and_moments_alone(tiny_base: Path, how: str) -> None:
    model, settings = model_of(tiny_base), replace(SKIP, spike=3.0, lr=1e-4)
    adam = loop.optimiser(model, settings)
    silent = batch.collate([Encoded((1, 2, 3), (False, False, False), "quiet")])
    wrong = {"loss": math.nan, "gradient": 1.0, "silent": 1.0, "spike": 4.0}[how]
    objective = sometimes(set() if how == "silent" else {10}, wrong, slope=how == "gradient")
    steps, batches = [], lambda step: (silent,) if how == "silent" and step == 10 else loader()(step)
    before = loop.snapshot(model, adam)
    for step in loop.train(model, batches, objective, adam, settings):
        steps.append(step)
        after = loop.snapshot(model, adam)
        assert same(before, after) == (step.step == 10)
        before = after
    assert [step.step for step in steps if step.sick] == [10] and len(steps) == 14
    assert steps[9].sick is not None and "step 10" in steps[9].sick
    assert sorted(steps[9].rows) == (["quiet"] if how == "silent" else sorted(batch_ids(10)))


def test_a_restart_after_a_skipped_step_is_bit_identical(tiny_base: Path) -> None:
    def descent(model: Any, adam: Any, sick: set[int], past: loop.Past) -> Any:
        return loop.train(model, loader(), sometimes(sick), adam, SKIP, past)

    model = model_of(tiny_base)
    adam = loop.optimiser(model, SKIP)
    steps = descent(model, adam, {3}, loop.Past())
    for _ in range(5):
        next(steps)
    saved = loop.snapshot(model, adam)
    rest = [step.loss for step in steps]
    fresh = model_of(tiny_base, seed=99)
    other = loop.optimiser(fresh, SKIP)
    loop.restore(fresh, other, saved)
    assert [step.loss for step in descent(fresh, other, set(), loop.Past(5))] == rest
    assert same(loop.snapshot(fresh, other), loop.snapshot(model, adam))


def test_a_spike_stops_by_default_and_is_judged_from_the_losses_of_the_past(tiny_base: Path) -> None:
    settings = replace(SETTINGS, spike=1.5)
    low, few, high = (0.1,) * loop.FIRST, (0.1,) * (loop.FIRST - 1), (9e9,) * loop.FIRST
    for past, spiked in ((low, True), (few, False), (high, False)):
        model = model_of(tiny_base)
        descent = loop.train(
            model, loader(), OBJECTIVE, loop.optimiser(model, settings), settings, loop.Past(1, past)
        )
        if spiked:
            with pytest.raises(loop.Sick, match=r"rows .*the loss of step 2 is .*, of those before it 0\.1"):
                next(descent)
        else:
            assert next(descent).sick is None


def test_a_step_dropped_between_two_micro_batches_was_never_there(tiny_base: Path) -> None:
    class Enough(Exception):
        pass

    calls = [0]

    def loss(policy: torch.Tensor, reference: torch.Tensor | None, micro: Batch) -> Loss:
        calls[0] += 1
        if calls[0] == 2:
            raise Enough
        return OBJECTIVE(policy, reference, micro)  # type: ignore[no-any-return]

    steps, end = run(tiny_base, micro_tokens=14, dropout=0.2)
    model = model_of(tiny_base, dropout=0.2)
    adam = loop.optimiser(model, SETTINGS)
    before = loop.snapshot(model, adam)
    with pytest.raises(Enough):
        next(loop.train(model, loader(14), loss, adam, SETTINGS))
    assert same(loop.snapshot(model, adam), before)
    again = list(loop.train(model, loader(14), loss, adam, SETTINGS))
    assert [step.loss for step in again] == [step.loss for step in steps]
    assert same(loop.snapshot(model, adam), end)
