"""Documents that go on or are scored, asked for by the official client, against plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier import template
from luthier.serving.limits import Limits
from tests.http.running import threaded
from tests.serving.make_home import World

TEXT = "the quick brown ünïcode fox"


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Any]:
    with (
        threaded(world.store, world.home, limits=Limits(default_tokens=8, grace_s=1.0)) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key=found.key, max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return template.load_tokenizer(world.home.artifact(world.model) / "base")


@pytest.fixture(scope="module")
def expected(world: World, tokenizer: Any) -> Any:
    """Log-probabilities of TEXT as plain transformers and peft have them."""
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(world.home.artifact(world.model) / "base"),
        world.home.artifact(world.releases[0]) / "adapter",
    )
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokenizer(TEXT)["input_ids"]])).logits[0]
    return torch.log_softmax(logits.float(), -1)


def ask(client: Any, prompt: Any, **more: Any) -> Any:
    return client.completions.create(model="guard", prompt=prompt, **more)


@pytest.mark.parametrize("more", [0, 1])
def test_a_document_is_scored_as_transformers_score_it(
    client: Any, tokenizer: Any, expected: torch.Tensor, more: int
) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    for prompt in (TEXT, ids):
        (choice,) = ask(client, prompt, echo=True, logprobs=1, max_tokens=more).choices
        told = choice.logprobs
        assert choice.text.startswith(TEXT) and len(told.tokens) == len(ids) + more
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        for at in range(1, len(ids)):
            assert told.token_logprobs[at] == pytest.approx(float(expected[at - 1, ids[at]]), abs=1e-4)
            likeliest = max(told.top_logprobs[at].values())
            assert likeliest == pytest.approx(float(expected[at - 1].max()), abs=1e-4)
            greedy = int(expected[at - 1].argmax()) == ids[at]
            assert (told.token_logprobs[at] == likeliest) is greedy


def test_many_prompts_are_answered_in_their_order(client: Any, tokenizer: Any) -> None:
    texts = ["one", "two and", "three"]
    alone = [ask(client, text, max_tokens=5).choices[0].text for text in texts]
    assert [choice.text for choice in ask(client, texts, max_tokens=5).choices] == alone
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert [choice.text for choice in ask(client, ids, max_tokens=5).choices] == alone
    twice = ask(client, texts, max_tokens=5, n=2).choices
    assert [choice.index for choice in twice] == list(range(6))
    assert [choice.text for choice in twice] == [text for text in alone for _ in range(2)]


def test_a_stream_says_what_the_whole_says(client: Any) -> None:
    whole = ask(client, TEXT, echo=True, logprobs=2, max_tokens=6)
    parts = list(ask(client, TEXT, echo=True, logprobs=2, max_tokens=6, stream=True))
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    told = [token for part in parts for token in part.choices[0].logprobs.tokens]
    assert told == whole.choices[0].logprobs.tokens
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_text_holds_no_control_token_but_token_ids_may(client: Any, tokenizer: Any) -> None:
    spelt = ask(client, "<|im_start|>", extra_body={"return_token_ids": True}).model_dump()
    assert not set(spelt["choices"][0]["prompt_token_ids"]) & set(tokenizer.all_special_ids)
    given = ask(client, [1, 70, 71], extra_body={"return_token_ids": True}).model_dump()
    assert given["choices"][0]["prompt_token_ids"] == [1, 70, 71]


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("logprobs", {"logprobs": 6}),
        ("best_of", {"best_of": 2}),
        ("suffix", {"suffix": "end"}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a"] * 2049}),
        ("prompt", {"prompt": [["a"]]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [10_000]}),
        ("n", {"n": 8, "prompt": ["a"] * 257}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client: Any, param: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **{"prompt": "a"} | wrong)
    assert refused.value.param == param
