"""Releases judged with weights in int8 answer with them, and only they."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from luthier.errors import ModelError
from luthier.home import Home
from luthier.inference import stack
from luthier.inference.decoder import Decoder
from luthier.inference.growing import Room
from luthier.inference.sampling import Sampling
from luthier.recipe import Release
from luthier.serving.limits import Limits
from luthier.serving.service import Options, Service
from luthier.store import Store
from tests.serving.make_home import NAME, PROMPTS, asked, publish_base, publish_release
from tests.serving.test_worker import ask_for, begin, finish

WORDS = dict(intended_use="a test", limits="none")


def test_a_recipe_that_rounds_weights_must_ask_for_parity() -> None:
    floor = {"name": "floor", "minimum": 0.1}
    with pytest.raises(ValidationError, match="parity"):
        Release(gates=[floor], weights="int8", **WORDS)
    assert Release(gates=[floor, {"name": "parity"}], weights="int8", **WORDS).weights == "int8"
    assert Release(gates=[floor], **WORDS).weights == "trained"


def test_where_int8_cannot_be_answered_with_it_is_said_before_anything_is_served(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    model = publish_base(home, tmp_path)  # float32
    with pytest.raises(ModelError, match="int8"):
        Decoder.load(home.artifact(model) / "base", "base", int8=True)


@pytest.mark.skipif(
    not stack.has_stack() or "amx_bf16" in stack.native.cpu_flags(),
    reason="weights in int8 are for CPUs with AVX2 or AVX512-BF16 and without AMX",
)
def test_releases_of_one_base_answer_each_with_the_weights_it_was_judged_with(tmp_path: Path) -> None:
    home = Home.at(tmp_path / "home")
    store = Store.open(home.path)
    model = publish_base(home, tmp_path, dtype="bfloat16")
    kinds: dict[str, dict[str, Any]] = {"trained": {}, "int8": {"weights": "int8"}}
    digests = {
        kind: publish_release(home, store, model, tmp_path, seed=seed, **changes)
        for seed, (kind, changes) in enumerate(kinds.items())
    }
    expected = {kind: alone(home, model, digest, kind == "int8") for kind, digest in digests.items()}
    assert alone(home, model, digests["int8"], False) != expected["int8"]  # rounding can be told
    with Service(store, home, Limits(active=4, waiting=8, adapters=2, bases=2)) as service:
        begun = {
            (kind, prompt): begin(
                service, ask_for(service, f"{NAME}@{digest}", prompt, Options(max_tokens=40))
            )
            for kind, digest in digests.items()
            for prompt in PROMPTS
        }
        for (kind, prompt), (events, _) in begun.items():
            assert finish(events)[0] == expected[kind][prompt], (kind, prompt)


def alone(home: Home, model: str, digest: str, int8: bool) -> dict[str, list[int]]:
    """What one release says to each prompt with nobody beside it."""
    from luthier import template

    base = home.artifact(model) / "base"
    tokenizer = template.load_tokenizer(base)
    decoder = Decoder.load(base, "base", Room(rows=1, adapters=1), int8=int8)
    decoder.add("it", home.artifact(digest) / "adapter")
    prompts = [template.prompt_ids(tokenizer, asked(prompt)) for prompt in PROMPTS]
    said = decoder.answers(prompts, Sampling(40), "it", template.stop_ids(tokenizer))
    return dict(zip(PROMPTS, said, strict=True))
