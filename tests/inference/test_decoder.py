"""Many answers at once say what each says alone, whatever shares the step, the pages and the prefix."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.errors import ModelError
from luthier.inference.decode import has_product
from luthier.inference.decoder import Decoder
from luthier.inference.growing import Growing, Grown, Room
from luthier.inference.pages import BLOCK
from luthier.inference.sampling import Chooser, Sampling
from tests.engine.tiny_families import FAMILIES, make
from tests.inference.test_generate import make_adapter
from tests.tiny import make_tiny_base

ADAPTERS = 8
World = tuple[Path, dict[str, Path]]
Alone = Callable[[list[int], str | None, int], list[int]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("decoder")
    base = make_tiny_base(folder / "base")
    adapters = {f"a{n}": make_adapter(base, folder / f"a{n}", seed=n) for n in range(ADAPTERS)}
    return base, adapters


def decoder_of(world: World, blocks: int = 0, **sizes: int) -> Decoder:
    base, adapters = world
    room = Room(adapters=ADAPTERS, **sizes)
    if blocks:  # a token of the tiny base keeps 2 layers x 2 sides x 2 heads x 16 features x 4 bytes
        room = replace(room, cache_bytes=blocks * BLOCK * 512)
    decoder = Decoder.load(base, "base", room)
    assert not blocks or decoder.pool.blocks == blocks
    for digest, folder in adapters.items():
        decoder.add(digest, folder)
    return decoder


@pytest.fixture(scope="module")
def decoder(world: World) -> Decoder:
    return decoder_of(world)


def greedy(tokens: int) -> Chooser:
    return Chooser(Sampling(tokens))


def drain(decoder: Decoder, most: int = 10_000) -> list[Grown]:
    found: list[Grown] = []
    for _ in range(most):
        if not decoder.busy:
            assert decoder.pool.held == 0
            return found
        found += decoder.step()
        decoder.check()
    raise AssertionError("it does not end")


def said(row: Growing) -> list[int]:
    return row.ids[row.prompt :]


@pytest.fixture(scope="module")
def alone(world: World) -> Alone:
    """What plain transformers and peft answer."""
    base, adapters = world
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    known: dict[Any, list[int]] = {}
    peft: Any = None
    for digest, folder in adapters.items():
        if peft is None:
            peft = PeftModel.from_pretrained(model, folder, adapter_name=digest)
        else:
            peft.load_adapter(folder, adapter_name=digest)
    peft.eval()

    def answer(prompt: list[int], adapter: str | None, tokens: int) -> list[int]:
        key = (tuple(prompt), adapter)
        if len(known.get(key, ())) < tokens:
            ids = torch.tensor([prompt])
            how = {"max_new_tokens": max(tokens, 12), "do_sample": False, "eos_token_id": None}
            if adapter is None:
                with peft.disable_adapter():
                    out = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
            else:
                peft.set_adapter(adapter)
                out = peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
            known[key] = out[0, len(prompt) :].tolist()
        return known[key][:tokens]

    return answer


def prompts_of(count: int, seed: int) -> list[list[int]]:
    """Random prompts, many of which begin alike."""
    draw = random.Random(seed)
    heads = [[draw.randrange(3, 250) for _ in range(length)] for length in (0, 16, 40)]
    return [
        [*draw.choice(heads), *(draw.randrange(3, 250) for _ in range(draw.randrange(1, 30)))]
        for _ in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_what_transformers_says(family: str) -> None:
    model = make(FAMILIES[family]())
    model.set_attn_implementation("eager")
    prompts = [[5, 9, 11, 4, 77, 23, 8, 1, 54, 90, 3, 7, 12, 13, 14, 15, 60, 61], [44], [9, 8, 7, 6]]
    with torch.inference_mode():
        expected = [
            model.generate(
                input_ids=torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=20,
                do_sample=False, eos_token_id=None,
            )[0, len(p) :].tolist()
            for p in prompts
        ]  # fmt: skip
    decoder = Decoder(model, family, Room(chunk=16))
    rows = [decoder.begin(prompt, greedy(20)) for prompt in prompts]
    drain(decoder)
    assert [said(row) for row in rows] == expected


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000), chunk=st.integers(1, 64), blocks=st.integers(6, 60), most=st.integers(1, 20)
)
def test_mixed_rows_say_what_each_says_alone_whatever_the_chunks_the_blocks_and_the_arrivals(
    world: World, alone: Alone, seed: int, chunk: int, blocks: int, most: int
) -> None:
    decoder = decoder_of(world, blocks, chunk=chunk, rows=most)
    draw = random.Random(seed)
    asked = [
        (prompt, draw.choice([None, *world[1]]), draw.randrange(1, 13)) for prompt in prompts_of(33, seed % 3)
    ]
    rows: list[Growing] = []
    dropped: set[int] = set()
    while len(rows) < len(asked) or decoder.busy:
        for prompt, adapter, tokens in asked[len(rows) : len(rows) + draw.randrange(0, 4)]:
            rows.append(decoder.begin(prompt, greedy(tokens), adapter))
        if rows and draw.random() < 0.05:
            dropped.add(gone := draw.randrange(len(rows)))
            decoder.cancel(rows[gone])
        decoder.step()
        decoder.check()
    assert decoder.pool.held == 0
    for number, (row, one) in enumerate(zip(rows, asked, strict=True)):
        expected = alone(*one)
        assert said(row) == (expected if number not in dropped else expected[: len(said(row))])


@pytest.mark.long
def test_two_hundred_mixed_requests_over_eight_adapters_say_what_each_says_alone(
    world: World, alone: Alone
) -> None:
    decoder = decoder_of(world, 120, chunk=48, rows=16)
    draw = random.Random(11)
    asked = [(prompt, draw.choice([*world[1]]), draw.randrange(1, 13)) for prompt in prompts_of(200, 4)]
    rows = [decoder.begin(prompt, greedy(tokens), adapter) for prompt, adapter, tokens in asked]
    drain(decoder)
    assert [said(row) for row in rows] == [alone(*one) for one in asked]


@pytest.mark.skipif(not has_product(), reason="no C++ for this CPU's instructions")
def test_in_bfloat16_company_changes_no_token(tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", dtype="bfloat16")
    folders = {f"a{n}": make_adapter(base, tmp_path / f"a{n}", seed=n) for n in range(2)}
    asked = [(prompt, ("a0", "a1", None)[n % 3]) for n, prompt in enumerate(prompts_of(9, 12))]

    def together(rows: int) -> list[list[int]]:
        decoder = Decoder.load(base, "base", Room(rows=rows, chunk=32))
        for digest, folder in folders.items():
            decoder.add(digest, folder)
        begun = [decoder.begin(prompt, greedy(12), adapter) for prompt, adapter in asked]
        drain(decoder)
        return [said(row) for row in begun]

    assert together(9) == together(1)


def test_a_row_wastes_less_than_a_block(decoder: Decoder) -> None:
    rows = [decoder.begin(prompt, greedy(9)) for prompt in prompts_of(6, 5)]
    while decoder.busy:
        decoder.step()
        for row in rows:
            assert len(row.blocks) * BLOCK < row.read + BLOCK


def test_a_cancelled_row_frees_its_blocks_at_once(decoder: Decoder) -> None:
    rows = [decoder.begin(prompt, greedy(9)) for prompt in prompts_of(6, 6)]
    decoder.step()
    for left, row in zip(range(5, -1, -1), rows, strict=True):
        held = sum(len(other.blocks) for other in rows)
        decoder.cancel(row)
        decoder.cancel(row)
        assert row.blocks == [] and decoder.pool.held <= held
        decoder.check()
        assert decoder.busy == (left > 0)
    assert decoder.pool.held == 0


def test_what_begins_alike_is_read_once_and_never_under_other_weights(world: World, alone: Alone) -> None:
    decoder = decoder_of(world)
    prompt = prompts_of(1, 7)[0] + list(range(3, 60))
    cold = decoder.begin(prompt, greedy(6), "a0")
    drain(decoder)
    for adapter, known in (("a0", True), ("a1", False), (None, False)):
        row = decoder.begin(prompt, greedy(6), adapter)
        decoder.step()
        assert (row.read >= len(prompt)) == (known or len(prompt) <= decoder.room.chunk)
        again = decoder._key(row, 0) == decoder._key(cold, 0)
        assert again == known
        drain(decoder)
        assert said(row) == alone(prompt, adapter, 6)


def test_new_weights_under_an_old_place_find_nothing_of_the_old(world: World, alone: Alone) -> None:
    base, adapters = world
    decoder = Decoder.load(base, "base", Room(adapters=1))
    prompt = list(range(3, 60))
    for digest in ("a0", "a1", "a0", "a2"):
        decoder.add(digest, adapters[digest])  # each takes the only slot
        row = decoder.begin(prompt, greedy(8), digest)
        drain(decoder)
        assert said(row) == alone(prompt, digest, 8)
        decoder.drop(digest)


@pytest.mark.parametrize("adapter", [None, "a3"])
def test_a_prompt_is_scored_as_transformers_scores_it_also_when_it_is_known(
    world: World, decoder: Decoder, alone: Alone, adapter: str | None
) -> None:
    prompt = list(range(5, 80))
    logp_T_V = torch.log_softmax(plain(world, adapter)(torch.tensor([prompt])).logits[0], -1)
    expected = [float(logp_T_V[n, token]) for n, token in enumerate(prompt[1:])]
    for _ in range(2):
        row = decoder.begin(prompt, Chooser(Sampling(2, logprobs=3)), adapter, score=True)
        grown = drain(decoder)
        (read,) = [one.read for one in grown if one.read is not None]
        assert read.logps[0] is None
        assert list(read.logps[1:]) == pytest.approx(expected, abs=1e-4)
        assert [[token for token, _ in top] for top in read.tops[1:]] == logp_T_V[:-1].topk(
            3
        ).indices.tolist()
        assert said(row) == alone(prompt, adapter, 2)


@pytest.mark.parametrize("adapter", [None, "a3"])
def test_an_embedding_is_the_mean_of_the_last_hidden_states(
    world: World, decoder: Decoder, adapter: str | None
) -> None:
    prompts = [list(range(5, 90)), [7], [9, 8, 7]]
    model = plain(world, adapter)
    expected = [
        model(torch.tensor([p]), output_hidden_states=True).hidden_states[-1][0].mean(0) for p in prompts
    ]
    found = decoder.embed(prompts, adapter)
    assert torch.allclose(found, torch.stack(expected), atol=1e-4)
    assert decoder.pool.held == 0


def test_a_long_prompt_stalls_no_row_that_grows(world: World) -> None:
    decoder = decoder_of(world, chunk=16)
    quick = decoder.begin([5, 6, 7], greedy(40))
    decoder.step()
    decoder.begin(list(range(3, 250)) * 3, greedy(1))
    for _ in range(20):
        before = len(said(quick))
        decoder.step()
        assert len(said(quick)) == before + 1
    drain(decoder)


def test_a_short_prompt_does_not_wait_for_a_long_one_and_the_long_one_goes_on(world: World) -> None:
    decoder = decoder_of(world, chunk=32)
    long = decoder.begin(list(range(3, 250)) * 4, greedy(1))
    decoder.step()
    for number in range(8):
        short = decoder.begin([number + 3, *range(40, 45)], greedy(1))
        before = long.read
        decoder.step()
        assert len(said(short)) == 1
        assert long.read >= before + 16
    drain(decoder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_give_no_numbers_end_their_own_answer_only(
    world: World, alone: Alone, tmp_path: Path, temperature: float
) -> None:
    decoder = Decoder.load(world[0], "base")
    mad = shutil.copytree(world[1]["a0"], tmp_path / "mad")
    weights = load_file(mad / "adapter_model.safetensors")
    save_file({name: weight * 1e30 for name, weight in weights.items()}, mad / "adapter_model.safetensors")
    decoder.add("mad", mad)
    decoder.add("a1", world[1]["a1"])
    prompts = prompts_of(3, 8)
    rows = [decoder.begin(prompt, greedy(6), "a1") for prompt in prompts]
    lost = decoder.begin(prompts[0], Chooser(Sampling(6, temperature=temperature)), "mad")
    grown = drain(decoder)
    assert [one.row for one in grown if one.error is not None] == [lost]
    assert [said(row) for row in rows] == [alone(prompt, "a1", 6) for prompt in prompts]


def test_a_token_no_model_has_ends_its_own_answer_only(world: World, alone: Alone) -> None:
    decoder = decoder_of(world)
    prompts = prompts_of(3, 9)
    rows = [decoder.begin(prompt, greedy(6), "a1") for prompt in prompts]
    lost = decoder.begin([5, 6, 100_000, 7], greedy(6), "a1")
    grown = drain(decoder)
    assert [one.row for one in grown if one.error is not None] == [lost]
    assert [said(row) for row in rows] == [alone(prompt, "a1", 6) for prompt in prompts]


def test_an_adapter_with_a_layer_missing_is_refused_without_a_trace(
    world: World, decoder: Decoder, alone: Alone, tmp_path: Path
) -> None:
    torn = shutil.copytree(world[1]["a0"], tmp_path / "torn")
    weights = load_file(torn / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layers.0.mlp.down_proj" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, torn / "adapter_model.safetensors")
    held = decoder.adapters
    fresh = Decoder.load(world[0], "base")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.down_proj"):
        fresh.add("torn", torn)
    assert fresh.adapters == () and decoder.adapters == held
    row = fresh.begin([5, 6, 7], greedy(6))
    drain(fresh)
    assert said(row) == alone([5, 6, 7], None, 6)


@torch.no_grad()
def plain(world: World, adapter: str | None) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(world[0]).eval()
    return model if adapter is None else PeftModel.from_pretrained(model, world[1][adapter]).eval()
