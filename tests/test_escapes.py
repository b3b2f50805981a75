"""A hundred ways out of a chat template's sandbox, none of which leads anywhere or takes more than it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from luthier import template
from luthier.errors import ModelError
from luthier.rendering import BYTES
from luthier.rows import Message, Role

VALUES = ("messages", "''", "()", "{}", "messages[0]", "messages[0].content", "namespace()", "loop_of_none")
WALKS = (
    "{{ %s.__class__ }}",
    "{{ %s['__class__']['__mro__'] }}",
    "{{ %s|attr('__class__')|attr('__base__') }}",
    "{{ %s.__class__.__mro__[-1].__subclasses__() }}",
    "{{ (%s|attr('\\x5f\\x5fclass\\x5f\\x5f'))|attr('\\x5f\\x5fmro\\x5f\\x5f') }}",
    "{%% for c in %s.__class__.__base__.__subclasses__() %%}{{ c }}{%% endfor %%}",
)
CALLABLES = (
    "raise_exception", "strftime_now", "range", "dict", "lipsum", "cycler", "joiner", "namespace",
    "''.format",
)  # fmt: skip
GLOBALS = ("{{ %s.__globals__ }}", "{{ %s.__init__.__globals__['os'].popen('id').read() }}")
OTHERS = (
    "{{ self }}", "{{ self._TemplateReference__context }}", "{{ self.__init__.__globals__ }}",
    "{{ config }}", "{{ request }}", "{{ environ }}", "{{ __import__('os') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ eval('1') }}", "{{ exec('1') }}", "{{ globals() }}", "{{ vars() }}", "{{ getattr('', 'x') }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}{{ os }}",
    "{% from 'os' import popen %}{{ popen }}",
    "{% extends '/etc/passwd' %}", "{% set x = ''.__class__ %}{{ x.__mro__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}", "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ '{x.__class__}'.format_map({'x': ''}) }}", "{{ ('{0' ~ '.__class__}').format(1) }}",
    "{{ '%s'|format(''.__class__) }}", "{{ ''|attr('format')('{0.__class__}') }}",
    "{{ ['{0.__class__.__mro__}']|map('format', 1)|list }}",
    "{{ [messages]|map(attribute='__class__')|list }}",
    "{{ messages|map('attr', '__class__')|list }}", "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='__class__') }}", "{{ messages|selectattr('__class__')|list }}",
    "{{ messages|sum(attribute='__class__', start='') }}", "{{ ({}|attr('__getitem__')).__self__ }}",
    "{{ messages.append(messages) }}", "{{ messages.clear() }}{{ messages }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages[0].pop('content') }}", "{{ messages.extend(messages) }}", "{{ {}.setdefault('a', 1) }}",
    "{{ cycler.__init__.__code__ }}", "{{ (range(3)).__reduce__() }}", "{{ ''.join.__self__.__class__ }}",
    "{{ (messages|select|list).__class__ }}", "{{ ((x for x in messages)).gi_frame }}",
    "{% set g = messages|map('upper') %}{{ g.gi_frame.f_back.f_globals }}", "{{ g.__next__.__self__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for a in [1] %}{{ loop.__init__.__globals__ }}{{ loop._iterator }}{% endfor %}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% generation %}{{ self.__class__ }}{% endgeneration %}", "{{ messages|tojson.__globals__ }}",
    "{{ range(10 ** 9)|list }}", "{{ range(100001)|list }}", "{{ 'x'.ljust(10 ** 9) }}",
    "{{ 'x'.center(10 ** 9) }}", "{{ 'x'.zfill(10 ** 9) }}", "{{ '{:>999999999}'.format(1) }}",
    "{{ '%0999999999d'|format(1) }}", "{{ 'x' * 10 ** 10 }}", "{{ [[0] * 9999] * 999999 }}",
    "{{ 9 ** 9 ** 9 }}", "{{ (10 ** 4300) ** 4300 }}",
    "{{ ('x' * 9999).replace('x', 'y' * 9999).replace('y', 'z' * 99) }}",
    "{{ lipsum(n=999999) }}", "{{ 'a'|indent(10 ** 9) }}",
    "{{ 'a b'|wordwrap(1, wrapstring='x' * 10 ** 9) }}",
    "{{ messages|batch(10 ** 9, 'x')|list }}", "{{ messages|slice(10 ** 9)|list }}",
    "{% set n = namespace(x=[0]) %}{% for a in range(64) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{{ a }}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)  # fmt: skip
PAYLOADS = [
    *(walk % value for walk in WALKS for value in VALUES[:5]),
    *(path % value for path in GLOBALS for value in CALLABLES),
    *OTHERS,
]
LEAKS = ("<class", "<function", "<built-in", "<module", "root:", "object at 0x", "uid=", "f_globals", "<code")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return template.load_tokenizer(tiny_base)


def test_there_are_a_hundred_ways() -> None:
    assert len(set(PAYLOADS)) >= 100


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_template_leads_out_or_takes_more_than_it_may(tokenizer: Any, payload: str) -> None:
    said = [Message(Role.USER, "hello")]
    tokenizer.chat_template = payload
    try:
        text = template._render(tokenizer, said, (), opened=True, where="x", apart=True).text
    except ModelError:
        pass
    else:
        assert len(text) < BYTES and not [leak for leak in LEAKS if leak in text], text[:300]
    assert said == [Message(Role.USER, "hello")]
