"""Templates from strangers: the plain ones in place, the rest in a child that cuts what runs away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier import template
from luthier.errors import ModelError
from luthier.rendering import RENDERER, Cut, plain
from luthier.rows import chat, conversation
from luthier.tool_calls import Convention, turns
from tests.test_tool_calls import LIST, OBJECT, TAGS, TALK, TOOL
from tests.tiny import CHATML

LOOP = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(99) %}"
    "{% endfor %}{% endfor %}{% endfor %}"
)
RUNAWAY = {
    "nested loops": LOOP,
    "loops over the conversation": "{% for a in messages * 999 %}{% for b in messages * 999 %}"
    "{% for c in messages * 999 %}{% endfor %}{% endfor %}{% endfor %}",
    "a long string": "{{ 'x' * 10 ** 9 }}",
    "a long list": "{{ [0] * 10 ** 9 }}",
    "padding": "{{ 'x'.rjust(10 ** 9) }}",
    "a format": "{{ '%999999999d' % 1 }}",
    "doubling": "{% set n = namespace(x='x') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a big number": "{{ 7 ** (7 ** 12) }}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}" + LOOP,
    "blocks": "{% set x %}y{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
}
REFUSED = {
    "a long range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a way out": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.fixture
def tokenizer(tiny_base: Path) -> Any:
    return template.load_tokenizer(tiny_base)


@pytest.mark.parametrize("name", RUNAWAY)
def test_a_template_that_runs_away_is_cut_and_the_next_one_is_rendered(tokenizer: Any, name: str) -> None:
    assert not plain(RUNAWAY[name])
    tokenizer.chat_template = RUNAWAY[name]
    with pytest.raises(ModelError):
        template.prompt_ids(tokenizer, conversation(TALK, "x"))
    if name == "nested loops":
        with pytest.raises(Cut):
            template.encode(tokenizer, chat(TALK, "x"))
    tokenizer.chat_template = TAGS
    assert template.prompt_ids(tokenizer, conversation(TALK, "x"))


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_reaches_out_is_refused(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = REFUSED[name]
    with pytest.raises(ModelError) as refused:
        template.prompt_ids(tokenizer, conversation(TALK, "x"))
    assert not isinstance(refused.value, Cut)


@pytest.mark.parametrize("chat_template", [CHATML, TAGS, LIST, OBJECT])
def test_the_child_says_what_transformers_say(tokenizer: Any, chat_template: str) -> None:
    said = turns(conversation(TALK, "x"), (TOOL,), Convention.TAGS)
    values = {"conversations": [said], "tools": [TOOL], "add_generation_prompt": True}
    child = RENDERER.render(chat_template, tokenizer.special_tokens_map | values)
    assert child == tokenizer.apply_chat_template(
        said, tools=[TOOL], chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )


def test_common_templates_need_no_child() -> None:
    assert plain(CHATML)
    assert not plain(TAGS)  # a loop in a loop
