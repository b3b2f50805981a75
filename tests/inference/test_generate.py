from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.errors import ModelError
from luthier.inference.generate import (
    PADDED_TOKENS,
    ROWS,
    Runtime,
    batches,
    common_prefix,
)
from luthier.inference.sampling import Sampling, choose
from tests.tiny import make_tiny_base

NO_STOP: frozenset[int] = frozenset()
PROMPT = [1, 5, 60, 7, 88, 9, 120, 11]


def make_adapter(base: Path, folder: Path, *, seed: int, r: int = 4, modules: object = "all-linear") -> Path:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(model, LoraConfig(r=r, target_modules=modules, task_type="CAUSAL_LM"))
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    peft.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "aaaa": make_adapter(tiny_base, root / "a", seed=1),
        "bbbb": make_adapter(tiny_base, root / "b", seed=2, r=8, modules=["q_proj", "v_proj"]),
    }


@pytest.fixture
def runtime(tiny_base: Path, adapters: dict[str, Path]) -> Runtime:
    runtime = Runtime.load(tiny_base)
    for digest, folder in adapters.items():
        runtime.add(digest, folder)
    return runtime


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stream_gives_the_very_bits_of_plain_generate_with_peft(dtype: str, tmp_path: Path) -> None:
    base = make_tiny_base(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", seed=3)
    stranger = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    prompt = torch.tensor([PROMPT])
    expected = stranger.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24,
        eos_token_id=-1, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip

    runtime = Runtime.load(base)
    runtime.add("aaaa", adapter)
    seen: list[torch.Tensor] = []
    step = runtime._step
    runtime._step = lambda *given: (seen.append(step(*given)), seen[-1])[1]  # type: ignore[method-assign]
    tokens = list(runtime.stream(PROMPT, Sampling(24), "aaaa", NO_STOP))

    assert tokens == expected.sequences[0, len(PROMPT) :].tolist()
    assert len(set(tokens)) > 1
    for ours, theirs in zip(seen, expected.logits, strict=True):
        assert torch.equal(ours, theirs[0])


def test_without_adapter_the_bare_base_answers_though_adapters_are_loaded(
    tiny_base: Path, runtime: Runtime
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    ids = torch.tensor([PROMPT])
    expected = plain.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
        eos_token_id=-1, pad_token_id=0,
    )  # fmt: skip
    list(runtime.stream(PROMPT, Sampling(3), "aaaa", NO_STOP))
    assert list(runtime.stream(PROMPT, Sampling(12), None, NO_STOP)) == expected[0, len(PROMPT) :].tolist()


def test_streams_advanced_in_turn_say_what_they_say_alone(runtime: Runtime) -> None:
    asked = [(PROMPT, "aaaa"), (PROMPT, "bbbb"), (PROMPT[:5], None), (PROMPT[2:], "aaaa")]
    alone = [list(runtime.stream(prompt, Sampling(10), name, NO_STOP)) for prompt, name in asked]
    streams = [runtime.stream(prompt, Sampling(10), name, NO_STOP) for prompt, name in asked]
    together: list[list[int]] = [[] for _ in asked]
    for _ in range(10):
        for said, stream in zip(together, streams, strict=True):
            said.append(next(stream))
    assert together == alone
    assert alone[0] != alone[1]


def test_a_stream_ends_with_the_stop_token(runtime: Runtime) -> None:
    tokens = list(runtime.stream(PROMPT, Sampling(12), "aaaa", NO_STOP))
    stop = tokens[4]
    cut = tokens.index(stop)
    assert list(runtime.stream(PROMPT, Sampling(12), "aaaa", frozenset({stop}))) == tokens[: cut + 1]


@pytest.mark.parametrize("head", [[1, 40, 41, 42], []], ids=["shared prefix", "nothing shared"])
def test_batched_answers_are_those_of_single_streams(head: list[int], runtime: Runtime) -> None:
    generator = torch.Generator().manual_seed(5)
    prompts = [
        head + torch.randint(3, 250, (1 + n % 17,), generator=generator).tolist() for n in range(ROWS + 9)
    ]
    for adapter in ("aaaa", None):
        stop = frozenset(list(runtime.stream(prompts[0], Sampling(3), adapter, NO_STOP))[-1:])
        single = [list(runtime.stream(prompt, Sampling(4), adapter, stop)) for prompt in prompts]
        assert runtime.greedy(prompts, 4, adapter, stop) == single


def test_progress_grows_to_the_number_of_prompts(runtime: Runtime) -> None:
    told: list[int] = []
    prompts = [[1, 3 + n % 200] for n in range(2 * ROWS + 1)]
    runtime.greedy(prompts, 1, None, NO_STOP, lambda done, total: told.append(done))
    assert told == [ROWS, 2 * ROWS, 2 * ROWS + 1]


def test_no_prompts_give_no_answers(runtime: Runtime) -> None:
    assert runtime.greedy([], 4, None, NO_STOP) == []


def test_an_empty_prompt_is_refused_at_once(runtime: Runtime) -> None:
    with pytest.raises(ModelError, match="empty prompt"):
        runtime.stream([], Sampling(4), None, NO_STOP)
    with pytest.raises(ModelError, match="empty prompt"):
        runtime.greedy([[1], []], 4, None, NO_STOP)


def test_a_seed_repeats_a_sampled_answer_and_another_seed_does_not(runtime: Runtime) -> None:
    def say(seed: int) -> list[int]:
        sampling = Sampling(16, temperature=1.5, top_p=0.95, seed=seed)
        return list(runtime.stream(PROMPT, sampling, None, NO_STOP))

    assert say(4) == say(4)
    assert say(4) != say(5)


@given(st.floats(0.05, 0.95), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_a_sampled_token_lies_in_the_smallest_set_that_holds_top_p(top_p: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, generator=generator) * 3
    token = choose(logits, Sampling(1, temperature=1.0, top_p=top_p), generator)
    p, order = torch.softmax(logits, -1).sort(descending=True)
    size = int((p.cumsum(0) < top_p).sum()) + 1
    assert token in order[: size + 1].tolist()


def test_a_dropped_adapter_is_gone_and_the_others_still_answer(
    runtime: Runtime, adapters: dict[str, Path]
) -> None:
    before = list(runtime.stream(PROMPT, Sampling(8), "bbbb", NO_STOP))
    alive = runtime.stream(PROMPT, Sampling(8), "aaaa", NO_STOP)
    next(alive)
    runtime.drop("aaaa")
    assert runtime.adapters == ("bbbb",)
    with pytest.raises(ModelError, match="not loaded"):
        next(alive)
    with pytest.raises(ModelError, match="not loaded"):
        runtime.stream(PROMPT, Sampling(8), "aaaa", NO_STOP)
    assert list(runtime.stream(PROMPT, Sampling(8), "bbbb", NO_STOP)) == before
    runtime.drop("bbbb")
    runtime.add("bbbb", adapters["bbbb"])
    assert list(runtime.stream(PROMPT, Sampling(8), "bbbb", NO_STOP)) == before


def damaged(adapter: Path, folder: Path, change: object) -> Path:
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)  # type: ignore[operator]
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def first(weights: dict[str, torch.Tensor]) -> str:
    return sorted(weights)[0]


CHANGES = {
    "nan": lambda w: w[first(w)].view(-1).__setitem__(0, float("nan")),
    "infinite": lambda w: w[first(w)].view(-1).__setitem__(0, float("inf")),
    "wrong shape": lambda w: w.__setitem__(first(w), torch.zeros(4, 7)),
    "missing tensor": lambda w: w.__delitem__(first(w)),
    "stray tensor": lambda w: w.__setitem__("base_model.model.nowhere.lora_A.weight", torch.zeros(4, 64)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("loaded", [False, True], ids=["first", "beside another"])
def test_a_bad_adapter_is_refused_and_leaves_no_trace(
    change: object, loaded: bool, tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    runtime = Runtime.load(tiny_base)
    names = [name for name, _ in runtime.model.named_modules()]
    if loaded:
        runtime.add("bbbb", adapters["bbbb"])
    speaker = "bbbb" if loaded else None
    before = list(runtime.stream(PROMPT, Sampling(6), speaker, NO_STOP))
    bad = damaged(adapters["aaaa"], tmp_path / "bad", change)
    with pytest.raises(ModelError, match=r"bad"):
        runtime.add("cccc", bad)
    assert "cccc" not in runtime.adapters
    assert list(runtime.stream(PROMPT, Sampling(6), speaker, NO_STOP)) == before
    runtime.add("aaaa", adapters["aaaa"])
    fresh = Runtime.load(tiny_base)
    fresh.add("aaaa", adapters["aaaa"])
    assert list(runtime.stream(PROMPT, Sampling(6), "aaaa", NO_STOP)) == list(
        fresh.stream(PROMPT, Sampling(6), "aaaa", NO_STOP)
    )
    for name in runtime.adapters:
        runtime.drop(name)
    assert [name for name, _ in runtime.model.named_modules()] == names


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    adapter = make_adapter(tmp_path / "other", tmp_path / "adapter", seed=0)
    with pytest.raises(ModelError, match="does not fit this base"):
        Runtime.load(tiny_base).add("aaaa", adapter)


def test_files_that_could_run_code_are_refused(
    tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(adapters["aaaa"], folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="could run code"):
        Runtime.load(tiny_base).add("aaaa", folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="not an adapter folder"):
        Runtime.load(tiny_base).add("aaaa", folder)
    with pytest.raises(ModelError, match="no safetensors"):
        Runtime.load(folder)


@pytest.mark.parametrize(
    "setting",
    [{"modules_to_save": ["lm_head"]}, {"bias": "all"}, {"init_lora_weights": "pissa"}],
    ids=lambda setting: next(iter(setting)),
)
def test_an_adapter_that_would_change_the_shared_base_is_refused(
    setting: dict[str, object], tiny_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "greedy-adapter"
    shutil.copytree(adapters["aaaa"], folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | setting), "utf-8")
    with pytest.raises(ModelError, match=next(iter(setting))):
        Runtime.load(tiny_base).add("aaaa", folder)


@given(st.lists(st.integers(1, 400), max_size=200))
def test_batches_hold_every_row_once_and_keep_their_size(lengths: list[int]) -> None:
    made = list(batches(lengths))
    assert sorted(row for batch in made for row in batch) == list(range(len(lengths)))
    for batch in made:
        assert len(batch) <= ROWS
        assert len(batch) == 1 or max(lengths[row] for row in batch) * len(batch) <= PADDED_TOKENS


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=6))
def test_the_common_prefix_is_shared_by_all_and_leaves_each_a_token(prompts: list[list[int]]) -> None:
    length = common_prefix(prompts)
    assert all(prompt[:length] == prompts[0][:length] for prompt in prompts)
    assert all(len(prompt) > length for prompt in prompts)
    longer = [prompt[: length + 1] for prompt in prompts]
    assert min(map(len, prompts)) == length + 1 or any(prompt != longer[0] for prompt in longer)
