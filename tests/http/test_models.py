"""Names of models over HTTP, by the official client: bases and releases, and only what the caller may see."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from luthier.bases import Entry, enter
from tests.http.running import Client, threaded
from tests.serving.make_home import PROMPTS, World, copy_home


@pytest.fixture(scope="module")
def own(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    copy = copy_home(world, tmp_path_factory.mktemp("models") / "home")
    base = artifacts_base(copy)
    enter(copy.store, Entry("Tiny-Base", {}, copy.model, base, {}), "test")
    return copy


def artifacts_base(world: World) -> str:
    from luthier import artifacts

    return str(artifacts.read_json(world.home.artifact(world.model) / "base.json")["digest"])


@pytest.fixture(scope="module")
def server(own: World) -> Iterator[Client]:
    with threaded(own.store, own.home) as client:
        yield client


@pytest.fixture
def client(server: Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0) as client:
        yield client


def test_models_are_listed_retrieved_and_answer(client: openai.OpenAI, own: World) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"Tiny-Base", "guard@production", f"guard@{own.releases[0]}"} <= listed.keys()
    for name, model in listed.items():
        assert client.models.retrieve(name) == model and model.object == "model" and model.created > 0
    assert client.models.retrieve("guard").id == "guard"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("gourd")
    assert (unknown.value.param, unknown.value.code) == ("model", "model_not_found")


def test_a_base_answers_as_it_is_and_a_release_otherwise(client: openai.OpenAI, own: World) -> None:
    def said(model: str) -> str:
        turns = [{"role": "user", "content": PROMPTS[0]}]
        answer = client.chat.completions.with_raw_response.create(model=model, messages=turns, max_tokens=8)
        if model == "Tiny-Base":
            assert answer.headers["x-luthier-release"] == artifacts_base(own)
        return str(answer.parse().choices[0].message.content)

    assert said("Tiny-Base") == said("Tiny-Base") != said("guard")


@pytest.mark.parametrize("name", ["Tiny-Base", "guard", "guard@production"])
def test_only_tuned_models_can_be_deleted(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="only a tuned model"):
        client.models.delete(name)
    with pytest.raises(openai.NotFoundError):
        client.models.delete("ft:Tiny-Base:org::abc")
