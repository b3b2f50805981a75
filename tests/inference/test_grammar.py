from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from luthier import template
from luthier.inference.grammar import Grammar, GrammarRefused, Kind, check, constraint
from luthier.inference.sampling import Chooser, Sampling, choose_all

STRICT = {
    "type": "object",
    "properties": {
        "label": {"enum": ["safe", "unsafe"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 10},
        "why": {"type": "string", "maxLength": 12},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["label", "score", "why", "tags"],
    "additionalProperties": False,
}
HOSTILE = {
    "repeats": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    "one repeat": {"type": "string", "pattern": "a{100000}"},
    "in a key": {"type": "object", "patternProperties": {"(a{900}){900}": {}}},
    "long": {"type": "string", "pattern": "a" * 5000},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "elsewhere": {"$ref": "http://127.0.0.1:1/schema"},
    "a file": {"$ref": "file:///etc/passwd"},
    "unknown keyword": {"type": "string", "contentEncoding": "base64", "if": {}},
    "no schema": {"type": "nonsense"},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return template.load_tokenizer(tiny_base)


def said(tokenizer: Any, grammar: Grammar, seed: int, most: int = 400) -> str | None:
    """What a model without a thought says under the grammar; None where it ran out of room."""
    chooser = Chooser(Sampling(most, temperature=1.0, seed=seed), constraint(grammar, tokenizer))
    draw = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for _ in range(most):
        token = choose_all([chooser], torch.randn(1, 300, generator=draw))[0].token
        if token == tokenizer.eos_token_id:
            return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        ids.append(token)
    return None


def test_every_constrained_answer_parses_and_validates(tokenizer: Any) -> None:
    grammar = Grammar(Kind.JSON_SCHEMA, json.dumps(STRICT))
    answers = [said(tokenizer, grammar, seed) for seed in range(25)]
    assert None not in answers and len(set(answers)) > 20
    for answer in answers:
        jsonschema.validate(json.loads(answer or ""), STRICT)


def test_a_json_object_is_one_whatever_the_model_says(tokenizer: Any) -> None:
    answers = [said(tokenizer, Grammar(Kind.JSON_OBJECT), seed, 600) for seed in range(12)]
    done = [answer for answer in answers if answer is not None]
    assert done and all(isinstance(json.loads(answer), dict) for answer in done)


def test_an_expression_is_matched_whole(tokenizer: Any) -> None:
    for seed in range(10):
        answer = said(tokenizer, Grammar(Kind.REGEX, "(yes|no), [0-9]{2,4}"), seed)
        assert answer is not None and re.fullmatch("(yes|no), [0-9]{2,4}", answer)


def test_a_lark_grammar_is_obeyed(tokenizer: Any) -> None:
    grammar = Grammar(Kind.LARK, 'start: "a" b+ "."\nb: "b" | "c"')
    for seed in range(10):
        assert re.fullmatch("a[bc]+[.]", said(tokenizer, grammar, seed) or "")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_is_refused(tokenizer: Any, name: str) -> None:
    with pytest.raises(GrammarRefused):
        check(Grammar(Kind.JSON_SCHEMA, json.dumps(HOSTILE[name])), tokenizer)


def test_a_schema_is_bounded_in_depth_and_size(tokenizer: Any) -> None:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}}
    for text in (json.dumps(deep), '{"enum": ["' + "x" * 70_000 + '"]}', "[" * 100_000, "[]", "nonsense"):
        with pytest.raises(GrammarRefused):
            check(Grammar(Kind.JSON_SCHEMA, text), tokenizer)


def test_nothing_but_the_stop_token_follows_a_finished_answer(tokenizer: Any) -> None:
    rule = constraint(Grammar(Kind.REGEX, "ab"), tokenizer)
    for token in tokenizer("ab")["input_ids"]:
        assert not rule.ended
        rule.accept(token)
    assert rule.ended
    assert rule.mask(300).nonzero().flatten().tolist() == [tokenizer.eos_token_id]
