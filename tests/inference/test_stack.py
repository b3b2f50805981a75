"""All layers in one call say what transformers says, whoever shares the step and however it is cut."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from luthier.errors import ModelError
from luthier.inference import stack
from luthier.inference.adapters import Pair
from luthier.inference.answering import Answering
from luthier.inference.decode import Laid, Reach, Segment
from luthier.inference.pages import BLOCK

pytestmark = pytest.mark.skipif(
    not stack.has_stack() or "amx_bf16" in stack.native.cpu_flags(),
    reason="layers in one call are for CPUs with AVX2 or AVX512-BF16 and without AMX",
)


# A CPU with AVX512-BF16 knows AVX2's instructions too, so both kinds are tested on it.
KINDS = ("own", "avx2") if "avx512_bf16" in stack.native.cpu_flags() else ("own",)


@pytest.fixture(autouse=True, params=KINDS)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "avx2":
        monkeypatch.setattr(stack, "_library", lambda: stack.native.build(stack.SOURCE, "-mno-avx512f"))


SMALL: dict[str, Any] = {
    "vocab_size": 112, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL, head_dim=16),
    "llama, wide heads, all with keys of their own": lambda: LlamaConfig(
        **SMALL | {"num_attention_heads": 2, "vocab_size": 97}, head_dim=96, tie_word_embeddings=True
    ),
    "llama 3's rotary positions": lambda: LlamaConfig(
        **SMALL, head_dim=64,
        rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "mistral, a window": lambda: MistralConfig(**SMALL, sliding_window=21, head_dim=32),
    "qwen2, biases": lambda: Qwen2Config(**SMALL | {"num_attention_heads": 3, "num_key_value_heads": 1}),
    "qwen3, norms of heads": lambda: Qwen3Config(**SMALL, head_dim=16),
    "phi3, layers in one and half turned": lambda: Phi3Config(
        **SMALL | {"num_attention_heads": 3, "num_key_value_heads": 3}, partial_rotary_factor=0.5
    ),
}  # fmt: skip
LENGTHS, SLOTS = (70, 5, 41, 33), (0, 1, 2, 1)


def make(config: Any) -> Any:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with torch.no_grad():  # larger than the usual start, so that attention is far from uniform
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim == 2 else weight.add_(torch.randn(weight.shape) * 0.2)
    return model.to(torch.bfloat16)


def adapter_of(model: Any, seed: int, rank: int) -> dict[str, Pair]:
    draw = torch.Generator().manual_seed(seed)
    layers = {
        name: module for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    return {
        f"model.{name}": Pair(
            (torch.randn(rank, linear.in_features, generator=draw) * 0.1).bfloat16(),
            (torch.randn(linear.out_features, rank, generator=draw) * 0.1).bfloat16(),
            0.5,
        )
        for name, linear in layers.items()
        if not name.endswith(("k_proj", "up_proj"))  # a group of which some have none
    }


class Sequences:
    """Some sequences under some adapters, their blocks scattered, read in whatever pieces."""

    def __init__(self, model: Any, lengths: Sequence[int] = LENGTHS, slots: Sequence[int] = SLOTS) -> None:
        draw = random.Random(3)
        vocab = model.config.vocab_size
        self.ids = [[draw.randrange(vocab) for _ in range(length)] for length in lengths]
        self.slots = slots
        blocks = list(range(40))
        draw.shuffle(blocks)
        self.blocks = [[blocks.pop() for _ in range(6)] for _ in lengths]
        self.read = [0] * len(lengths)

    def step(self, answers: Any, counts: Sequence[int]) -> list[Tensor]:
        """The hidden states of the next `counts` tokens of each, in one step; nothing of those with 0."""
        ids: list[int] = []
        columns: list[tuple[int, int, int, int]] = []
        segments: list[Segment] = []
        order = sorted(range(len(counts)), key=lambda n: self.slots[n])
        for number in order:
            start = len(ids)
            for at in range(self.read[number], self.read[number] + counts[number]):
                ids.append(self.ids[number][at])
                columns.append(
                    (at, self.blocks[number][at // BLOCK] * BLOCK + at % BLOCK, self.slots[number], number)
                )
            self.read[number] += counts[number]
            if counts[number]:
                segments.append(Segment(self.slots[number], start, len(ids)))
        positions_T, places_T, slots_T, lines_T = torch.tensor(columns).T.contiguous()
        reach = Reach(torch.tensor(self.blocks, dtype=torch.int32), lines_T, positions_T + 1)
        hidden_T_E = answers.hidden(
            torch.tensor(ids), Laid(positions_T, places_T, slots_T, tuple(segments), reach)
        )
        return [hidden_T_E[lines_T == number] for number in range(len(counts))]

    def all(self, answers: Any, steps: Sequence[Sequence[int]]) -> list[Tensor]:
        parts = [self.step(answers, counts) for counts in steps]
        return [torch.cat(some) for some in zip(*parts, strict=True)]


def with_adapter(model: Any, pairs: dict[str, Pair]) -> Any:
    """The same model in float32 with an adapter merged."""
    merged = copy.deepcopy(model).float()
    with torch.no_grad():
        for name, pair in pairs.items():
            merged.get_submodule(name).weight += pair.scale * pair.b_O_R.float() @ pair.a_R_E.float()
    return merged


def truth(model: Any, pairs: dict[str, Pair], ids: list[int]) -> Tensor:
    with torch.inference_mode():
        return with_adapter(model, pairs).model(input_ids=torch.tensor([ids])).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_as_near_to_the_truth_as_transformers_is(family: str) -> None:
    model = make(FAMILIES[family]())
    pairs: list[dict[str, Pair]] = [{}, adapter_of(model, 1, 5), adapter_of(model, 2, 18)]
    plain = copy.deepcopy(model)
    sequences = Sequences(model)
    expected = [truth(model, pairs[slot], ids) for slot, ids in zip(SLOTS, sequences.ids, strict=True)]
    assert stack.takes(model)
    answers = stack.Stack(model, 40, 2)
    for slot in (1, 2):
        answers.put(slot, pairs[slot])
    found = sequences.all(answers, [(30, 0, 1, 17), (1, 1, 39, 1), (38, 4, 0, 15), (1, 0, 1, 0)])
    with torch.inference_mode():
        usual = plain.model(input_ids=torch.tensor([sequences.ids[0]])).last_hidden_state[0]
    usual_gap = float((usual.float() - expected[0]).norm() / expected[0].norm())
    for number, (got, right) in enumerate(zip(found, expected, strict=True)):
        gap = float((got.float() - right).norm() / right.norm())
        assert gap < 1.5 * usual_gap + 0.002, (number, gap, usual_gap)
        assert float((got.float() - right).abs().max()) < 0.2 * float(right.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_bits_do_not_depend_on_company_chunks_or_threads(family: str) -> None:
    model = make(FAMILIES[family]())
    answers = stack.Stack(model, 40, 2)
    for slot in (1, 2):
        answers.put(slot, adapter_of(make(FAMILIES[family]()), slot, 5 * slot))
    together = Sequences(model).all(answers, [(30, 2, 1, 17), (1, 1, 39, 1), (38, 1, 0, 15), (1, 1, 1, 0)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, length in enumerate(LENGTHS):
            alone = [tuple(length if n == number else 0 for n in range(len(LENGTHS)))]
            assert torch.equal(Sequences(model).all(answers, alone)[number], together[number])
    finally:
        torch.set_num_threads(threads)


def test_in_int8_each_weight_is_off_by_half_a_step_at_most() -> None:
    model = make(FAMILIES["llama"]())
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for layer in rounded.model.layers:
            for linear in (one for one in layer.modules() if isinstance(one, torch.nn.Linear)):
                step_O1 = linear.weight.float().abs().amax(1, keepdim=True) / 127
                linear.weight.data = (linear.weight.float() / step_O1).round() * step_O1
    sequences = Sequences(model, LENGTHS, (0, 1, 0, 0))
    pairs = adapter_of(model, 1, 5)
    expected = [
        truth(rounded.float(), pairs if slot else {}, ids)
        for slot, ids in zip((0, 1, 0, 0), sequences.ids, strict=True)
    ]
    sharp = stack.Stack(copy.deepcopy(model), 40, 2)
    answers = stack.Stack(model, 40, 2, int8=True)
    for one in (sharp, answers):
        one.put(1, pairs)
    unrounded = Sequences(rounded, LENGTHS, (0, 1, 0, 0)).all(sharp, [LENGTHS])
    for got, right, other in zip(sequences.all(answers, [LENGTHS]), expected, unrounded, strict=True):
        gap, other_gap = (float((x.float() - right).norm() / right.norm()) for x in (got, other))
        assert gap < 0.02 and gap < other_gap  # nearer to the rounded weights' truth than the sharp ones are


def test_what_another_left_in_a_block_is_never_heard() -> None:
    model = make(FAMILIES["llama"]())
    answers = stack.Stack(model, 40, 2)
    clean = Sequences(model).all(answers, [LENGTHS])
    answers._cache.fill_(float("nan"))
    again = Sequences(model).all(answers, [(33, 1, 7, 16), (37, 4, 34, 17)])
    assert all(torch.equal(one, other) for one, other in zip(clean, again, strict=True))


def test_an_emptied_slot_is_the_bare_base_again() -> None:
    model = make(FAMILIES["llama"]())
    pairs = adapter_of(model, 1, 4)
    answers = stack.Stack(model, 40, 2)
    bare = Sequences(model).all(answers, [LENGTHS])[1]
    answers.put(1, pairs)
    tuned = Sequences(model).all(answers, [LENGTHS])[1]
    answers.put(1, None)
    assert not torch.equal(bare, tuned)
    assert torch.equal(bare, Sequences(model).all(answers, [LENGTHS])[1])


@pytest.mark.parametrize("token", [-1, 112, 2**40])
def test_a_token_beyond_the_vocabulary_is_an_error_and_no_place_in_memory(token: int) -> None:
    model = make(FAMILIES["llama"]())
    sequences = Sequences(model)
    sequences.ids[2][3] = token
    with pytest.raises(IndexError, match="vocabulary"):
        sequences.step(stack.Stack(model, 40, 2), LENGTHS)


@pytest.mark.parametrize("words", [112, 97])
def test_logits_are_those_of_the_models_head(words: int) -> None:
    model = make(LlamaConfig(**SMALL | {"vocab_size": words}, head_dim=16))
    head = model.lm_head.weight.float().clone()
    answers = stack.Stack(model, 40, 2)
    x_B_E = torch.randn(5, 48).bfloat16()
    torch.testing.assert_close(answers.logits(x_B_E), x_B_E.float() @ head.T, rtol=1e-5, atol=1e-4)


def test_an_adapter_of_another_shape_is_refused_and_changes_nothing() -> None:
    model = make(FAMILIES["llama"]())
    pairs = adapter_of(model, 1, 4)
    answers = stack.Stack(model, 40, 2)
    before = Sequences(model).all(answers, [LENGTHS])[1]
    wrong = pairs | {"model.layers.2.mlp.down_proj": Pair(torch.zeros(4, 7), torch.zeros(48, 4), 1.0)}
    for bad in (wrong, {"model.layers.9.mlp.down_proj": pairs["model.layers.0.mlp.down_proj"]}):
        with pytest.raises(ModelError):
            answers.put(1, bad)
    assert torch.equal(before, Sequences(model).all(answers, [LENGTHS])[1])


def test_what_is_not_taken_goes_the_other_way() -> None:
    model = make(LlamaConfig(**SMALL | {"intermediate_size": 72}, head_dim=16))
    assert not stack.takes(model)
    assert not stack.takes(make(FAMILIES["llama"]()).float())
    answers = Answering(model, 40, 2)
    assert Sequences(model).all(answers, [LENGTHS])[0].shape == (70, 48)
