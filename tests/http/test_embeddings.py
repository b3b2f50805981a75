"""Vectors over the wire, asked for by the official client, against plain transformers."""

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

TEXTS = ["hello there", "señor, ¿qué tal?", "x"]


@pytest.fixture(scope="module")
def client(world: World) -> Iterator[Any]:
    with (
        threaded(world.store, world.home, limits=Limits(default_tokens=8, grace_s=1.0)) as found,
        openai.OpenAI(base_url=f"{found.url}/v1", api_key=found.key, max_retries=0) as client,
    ):
        yield client


def test_a_vector_is_the_mean_hidden_state_at_unit_length(world: World, client: Any) -> None:
    base = world.home.artifact(world.model) / "base"
    tokenizer = template.load_tokenizer(base)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), world.home.artifact(world.releases[0]) / "adapter"
    )
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = client.embeddings.create(model="guard", input=TEXTS)  # the client asks for base64 by itself
    plain = client.embeddings.create(model="guard", input=ids, encoding_format="float")
    assert found.usage.prompt_tokens == sum(map(len, ids))
    for n, row in enumerate(ids):
        with torch.inference_mode():
            states = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0]
        expected = torch.nn.functional.normalize(states.float().mean(0), dim=0).tolist()
        assert found.data[n].index == n
        assert found.data[n].embedding == pytest.approx(expected, abs=1e-4)
        assert plain.data[n].embedding == pytest.approx(expected, abs=1e-4)
    single = client.embeddings.create(model="guard", input=TEXTS[1], dimensions=len(plain.data[0].embedding))
    assert single.data[0].embedding == pytest.approx(found.data[1].embedding, abs=1e-4)


@pytest.mark.parametrize(
    ("param", "wrong"),
    [
        ("input", {"input": ""}),
        ("input", {"input": []}),
        ("input", {"input": ["a"] * 2049}),
        ("dimensions", {"dimensions": 3}),
        ("encoding_format", {"encoding_format": "xml"}),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(client: Any, param: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(**{"model": "guard", "input": "a"} | wrong)
    assert refused.value.param == param
