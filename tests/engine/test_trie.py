"""What rows share is computed once, with the log-probabilities and gradients of rows computed in full."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine import attention, base, batch, documents, fused, head, trie
from luthier.engine.documents import Documents
from luthier.engine.native import kernels
from luthier.objectives import Batch
from luthier.template import Encoded
from tests.engine.test_attention import rows as unrelated
from tests.engine.test_fused import adapted, gap
from tests.engine.tiny_families import FAMILIES, make

FLAT = 0
BOUND = 4e-6  # of float32; the sum over rows is taken in another order, so the last digits move (2.2e-6 came)
MODELS = {family: make(FAMILIES[family]()) for family in ("llama", "mistral")}
# Few different tokens, so that rows nest, end inside each other and repeat.
TREES = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple), min_size=1, max_size=8)
# All computed again, whole or in blocks of queries; or streamed, where rotary positions are autograd's.
LIMITS = [
    [(documents, "SHORT", 0)],
    [(documents, "SHORT", 0), (documents, "QUERIES", 4)],
    [(attention, "LONG", 0)],
]


def text(seed: int, length: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(1, 97) for _ in range(length))


def row(ids: tuple[int, ...], name: str, prompt: int) -> Encoded:
    return Encoded(ids, tuple(at >= prompt for at in range(len(ids))), name)


def related() -> list[Encoded]:
    """A system prompt, pairs below it, a row in others, twins, a stranger; losses in shared tokens too."""
    system, ask, tell = text(1, 19), text(2, 9), text(3, 23)
    first = system + ask
    return [
        row(first + text(4, 11), "chosen", len(first)),
        row(first + text(5, 8), "rejected", len(first)),
        row(system + tell + text(6, 5), "other prompt", len(system) + 20),
        row(system + tell + text(7, 17), "other answer", len(system) + 20),
        row(text(8, 12), "stranger", 4),
        row(system + tell, "inside others", 10),
        row(system + ask + text(9, 11), "twin", 25),
        row(system + ask + text(9, 11), "twin with other losses", 30),
        row(system[:7], "too short", 2),
    ]


def layout(micro: Batch) -> Documents:
    return Documents.of(micro.lengths_S or micro.lengths_D, micro.parents_S)


def learnt(model: Any, micro: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and gradients of a sum that weighs every (row, target) differently."""
    model.zero_grad(set_to_none=True)
    logps_N = head.batch_logps(model, micro)
    (logps_N * torch.linspace(0.3, 1.7, len(logps_N))).sum().backward()
    return logps_N.detach(), {
        name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
    }


def worst(model: Any, some: list[Encoded], block: int) -> float:
    """The largest relative distance from flat, over log-probabilities and every gradient."""
    (logps_N, found), (flat_N, flat) = (learnt(model, batch.collate(some, size)) for size in (block, FLAT))
    assert found.keys() == flat.keys() and flat
    biggest = max(float(gradient.norm()) for gradient in flat.values())
    return max(
        gap(logps_N, flat_N),
        *(
            float((found[name] - gradient).norm()) / max(float(gradient.norm()), 1e-3 * biggest)
            for name, gradient in flat.items()
        ),
    )


@pytest.mark.parametrize("block", [1, 4, trie.BLOCK])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shared_is_flat_for_every_weight_of_a_model(family: str, block: int) -> None:
    some = related()
    micro = batch.collate(some, block)
    assert len(micro.ids_T) < sum(micro.lengths_D) == sum(len(one.ids) for one in some)
    assert worst(make(FAMILIES[family]()), some, block) < BOUND


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shared_is_flat_for_fused_adapters(family: str) -> None:
    model = adapted(FAMILIES[family]())
    fused.fuse(model, kernels(compiled=False))
    assert worst(model, related(), 1) < BOUND


@pytest.mark.parametrize("fuse", [False, True])
def test_shared_is_flat_in_bfloat16_but_for_rounding(fuse: bool) -> None:
    model = adapted(FAMILIES["llama"]())
    for weight in model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    if fuse:
        fused.fuse(model, kernels(compiled=False))
    assert worst(model, related(), 1) < (2e-2 if fuse else 3e-2)  # PEFT casts, and so rounds, more often


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("family", ["gemma3", "llama", "mistral"])
def test_recomputed_and_streamed_attention_share_as_well(
    family: str, limits: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in limits:
        monkeypatch.setattr(*limit)
    model = adapted(FAMILIES[family]())
    assert worst(model, related(), 1) < BOUND
    fused.fuse(model, kernels(compiled=False))
    assert worst(model, related(), 1) < BOUND


@settings(max_examples=40, deadline=None)
@given(trees=TREES, block=st.integers(1, 3), family=st.sampled_from(["llama", "mistral"]))
def test_shared_is_flat_for_any_rows(trees: list[tuple[int, ...]], block: int, family: str) -> None:
    some = [row((3, *ids), str(number), 1) for number, ids in enumerate(trees)]
    assert worst(MODELS[family], some, block) < BOUND


def test_a_token_that_many_rows_learn_is_learnt_as_often() -> None:
    prompt = text(1, 16)
    some = [row((*prompt, answer), str(answer), 10) for answer in (5, 6)]
    micro = batch.collate(some)
    assert len(micro.ids_T) == 18 and micro.parents_S == (-1, 0, 0)
    assert micro.places_N.tolist() == [9, 10, 11, 12, 13, 14, 15] * 2  # place 15 predicts both answers
    assert micro.targets_N.tolist() == [*prompt[10:], 5, *prompt[10:], 6]
    assert micro.rows_N.tolist() == [0] * 7 + [1] * 7
    assert micro.positions_T.tolist() == [*range(16), 16, 16]


@given(trees=TREES, block=st.integers(1, 5))
def test_a_tree_spells_its_rows_and_holds_each_prefix_once(trees: list[tuple[int, ...]], block: int) -> None:
    tree = trie.grow(trees, block)
    for number, ids in enumerate(trees):
        path = [tree.segments[at] for at in tree.path(number)]
        assert [part.start for part in path] == [0, *(part.stop for part in path[:-1])]
        assert ids == tuple(token for part in path for token in trees[part.row][part.start : part.stop])
    assert all(part.parent < number for number, part in enumerate(tree.segments))
    assert all(part.stop > part.start for part in tree.segments)

    # A token is laid out once for each row up to the end of its block, or each row if that block is broken.
    def full(ids: tuple[int, ...]) -> range:
        return range(0, len(ids) - block + 1, block)

    whole = {(ids[: end + block], end + n) for ids in trees for end in full(ids) for n in range(block)}
    rest = {(ids, at) for ids in trees for at in range(len(ids) // block * block, len(ids))}
    assert sum(part.stop - part.start for part in tree.segments) == len(whole) + len(rest)


@given(trees=TREES, budget=st.integers(1, 40), block=st.integers(1, 3))
def test_pieces_keep_every_row_once_and_know_their_tokens(
    trees: list[tuple[int, ...]], budget: int, block: int
) -> None:
    found = trie.pieces(trees, budget, block)
    assert sorted(number for members, _ in found for number in members) == list(range(len(trees)))
    for members, tokens in found:
        tree = trie.grow([trees[number] for number in members], block)
        assert tokens == sum(part.stop - part.start for part in tree.segments)
        assert tokens <= budget or len(members) == 1


@given(seed=st.integers(0, 999), count=st.integers(1, 12), budget=st.integers(20, 150))
def test_micro_batches_of_related_rows_stay_within_the_budget(seed: int, count: int, budget: int) -> None:
    draw = random.Random(seed)
    system = text(1, 20)
    some = [
        row(system + text(draw.randrange(3), 18) + text(draw.randrange(4), draw.randrange(1, 20)), str(n), 30)
        for n in range(count)
    ]
    micros = batch.micro_batches(some, budget)
    assert sorted(name for micro in micros for name in micro.rows) == sorted(one.id for one in some)
    assert tuple(len(micro.ids_T) for micro in micros) == batch.sizes(some, budget)
    for micro in micros:
        assert len(micro.ids_T) <= budget or len(micro.rows) == 1
        assert len(micro.lengths_D) == len(micro.rows)
    assert sum(sum(micro.lengths_D) for micro in micros) == sum(len(one.ids) for one in some)


def test_a_pair_is_packed_together() -> None:
    pairs = [
        row(text(number, 40) + text(100 * number + which, 9), f"{number}{which}", 40)
        for which in (1, 2)
        for number in range(6)
    ]
    for micro in batch.micro_batches(pairs, 140):
        assert sorted(name[0] for name in micro.rows) == sorted(2 * sorted({name[0] for name in micro.rows}))
        assert len(micro.ids_T) == sum(micro.lengths_D) - 32 * (len(micro.rows) // 2)


def test_rows_that_share_nothing_are_laid_out_and_packed_as_if_sharing_did_not_exist() -> None:
    some = unrelated((31, 9, 17, 9, 25))
    micro, flat = batch.collate(some), batch.collate(some, FLAT)
    assert micro.parents_S == micro.lengths_S == flat.parents_S == ()
    assert micro.ids_T.tolist() == [token for one in some for token in one.ids]
    for one, other in zip(vars(micro).values(), vars(flat).values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert not any(group.path for group in layout(micro).groups)
    assert batch.bins(some, 40) == batch.pack([len(one.ids) for one in some], 40)


def test_a_batch_is_a_function_of_its_rows_alone() -> None:
    one, other = (batch.collate(related()) for _ in range(2))
    for first, second in zip(vars(one).values(), vars(other).values(), strict=True):
        assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second
    model = make(FAMILIES["llama"]())
    (logps_N, gradients), (again_N, again) = learnt(model, one), learnt(model, other)
    assert torch.equal(logps_N, again_N)
    assert all(torch.equal(gradients[name], again[name]) for name in gradients)


def test_those_that_follow_the_same_tokens_attend_together() -> None:
    prompt = text(1, 32)
    answers = ((2, 9), (3, 30), (4, 12), (5, 16))
    some = [row(prompt + text(seed, length), str(seed), 32) for seed, length in answers]
    groups = layout(batch.collate(some)).groups
    found = [(group.before, group.documents, group.length) for group in groups]
    assert found == [(0, 1, 32), (32, 2, 30), (32, 2, 12)]
    assert groups[1].path == groups[2].path == ((0, 0, 32),)


def test_packing_is_proven_on_shared_rows_too() -> None:
    assert base.prove(make(FAMILIES["qwen3"]()), related()) < 1e-4


def test_a_model_with_adapters_gives_rows_the_answers_they_have_alone() -> None:
    model = adapted(FAMILIES["gemma3"]())
    alone = copy.deepcopy(model)
    fused.fuse(model, kernels(compiled=False))
    with torch.no_grad():
        together_N = head.batch_logps(model, batch.collate(related(), 1))
        single_N = torch.cat([head.batch_logps(alone, batch.collate([one])) for one in related()])
    assert gap(together_N, single_N) < 2e-6
