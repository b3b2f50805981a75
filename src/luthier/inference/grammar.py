"""Answers that must fit a grammar: which tokens may come next, by llguidance.

Source: https://github.com/guidance-ai/llguidance (an Earley parser over a lexer of regex derivatives; its
limits on fuel, states and grammar size bound each step). JSON Schema is read as that library reads it
(https://json-schema.org/draft/2020-12): a keyword it does not know is refused, never ignored. White space
between JSON tokens is allowed but bounded, or a model that likes blanks would never end.

A grammar comes from strangers: its text, its depth and its counted repetitions are bounded before anything
is compiled, for `(a{1000}){1000}` costs seconds however little fuel it is given.
It does not know requests, models or sampling. A constraint is owned by one thread.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from luthier.errors import DataError

TEXT_BYTES = 64 * 1024
DEPTH = 32
PATTERN = 1024  # characters of one regular expression
REPEATS = 10_000  # what its counted repetitions may multiply to
REPEAT = 1_000  # and the largest one
COMPILE_S = 0.2
BLANKS = r"[\x20\x0A\x09]{0,20}"
COUNTED = re.compile(r"\{(\d{1,9})?(?:(,)(\d{1,9})?)?\}")


class Kind(StrEnum):
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must be. `text` is the schema as JSON, the expression, or the Lark grammar."""

    kind: Kind
    text: str = ""


class GrammarRefused(DataError):
    """This grammar cannot be compiled, or not within bounds."""

    http_code = 400


class Constraint:
    """One answer's place in its grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def mask(self, vocabulary: int) -> Tensor:
        """Which of `vocabulary` tokens may come next; only the stop token once the grammar is complete."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed = (bits[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).flatten().bool()
        if len(allowed) < vocabulary:
            allowed = torch.cat([allowed, allowed.new_zeros(vocabulary - len(allowed))])
        self._require()
        return allowed[:vocabulary]

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._require()

    @property
    def ended(self) -> bool:
        """Nothing but the stop token may follow."""
        return bool(self._matcher.is_stopped())

    def _require(self) -> None:
        if self._matcher.is_error():
            raise GrammarRefused(f"the grammar became too complex: {_said(self._matcher)}")


def constraint(grammar: Grammar, tokenizer: Any) -> Constraint:
    """A fresh constraint for one answer; raises `GrammarRefused` before it costs more than its bounds."""
    from llguidance import LLMatcher

    matcher = LLMatcher(vocabulary(tokenizer), compiled(grammar), log_level=0, limits=_limits())
    if matcher.is_error():
        raise GrammarRefused(f"the grammar cannot be used: {_said(matcher)}")
    return Constraint(matcher)


def check(grammar: Grammar, tokenizer: Any) -> None:
    """Compile it once and take the first mask; what takes longer than `COMPILE_S` is refused."""
    size = vocabulary(tokenizer).vocab_size  # built once for a tokenizer, and not the grammar's fault
    began_s = time.thread_time()  # not the clock: a busy machine is not the grammar's fault either
    constraint(grammar, tokenizer).mask(size)
    if time.thread_time() - began_s > COMPILE_S:
        raise GrammarRefused(
            f"the grammar takes longer than {COMPILE_S * 1000:.0f} ms to compile",
            hint="make it smaller: fewer alternatives, shorter counted repetitions",
        )


def compiled(grammar: Grammar) -> str:
    """The grammar in llguidance's own form, its bounds checked."""
    from llguidance import LLMatcher

    if len(grammar.text.encode("utf-8", "surrogatepass")) > TEXT_BYTES:
        raise GrammarRefused(f"the grammar is larger than {TEXT_BYTES} bytes")
    try:
        match grammar.kind:
            case Kind.JSON_OBJECT:
                return _json({"type": "object"})
            case Kind.JSON_SCHEMA:
                return _json(_schema(grammar.text))
            case Kind.REGEX:
                _bounded_pattern(grammar.text)
                return str(LLMatcher.grammar_from_regex(grammar.text))
            case Kind.LARK:
                _bounded_counts(grammar.text)
                return str(LLMatcher.grammar_from_lark(grammar.text))
    except ValueError as error:
        if isinstance(error, GrammarRefused):
            raise
        raise GrammarRefused(f"the grammar cannot be read: {str(error)[:200]}") from error


def _json(schema: Any) -> str:
    from llguidance import LLMatcher

    options: Any = {"whitespace_pattern": BLANKS, "whitespace_flexible": True, "lenient": False}
    return str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options))


def _schema(text: str) -> Any:
    try:
        schema = json.loads(text)
    except RecursionError:
        raise GrammarRefused(f"the schema is nested deeper than {DEPTH} levels") from None
    if not isinstance(schema, dict):
        raise GrammarRefused("a JSON schema is an object")
    level: list[Any] = [schema]
    for _ in range(2 * DEPTH):  # a level of schema is two of JSON: `properties` and the name within
        for node in level:
            if isinstance(node, dict) and isinstance(node.get("pattern"), str):
                _bounded_pattern(node["pattern"])
            for pattern in _keys_that_are_patterns(node):
                _bounded_pattern(pattern)
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            schema.pop("x-guidance", None)  # the library's own options are not a client's to set
            return schema
    raise GrammarRefused(f"the schema is nested deeper than {DEPTH} levels")


def _keys_that_are_patterns(node: Any) -> list[str]:
    found = node.get("patternProperties") if isinstance(node, dict) else None
    return list(found) if isinstance(found, dict) else []


def _bounded_pattern(pattern: str) -> None:
    if len(pattern) > PATTERN:
        raise GrammarRefused(f"a regular expression is longer than {PATTERN} characters")
    _bounded_counts(pattern)


def _bounded_counts(pattern: str) -> None:
    product = 1
    for low, _, high in COUNTED.findall(pattern):
        count = max(int(low or 0), int(high or 0), 1)
        product *= count
        if count > REPEAT or product > REPEATS:
            raise GrammarRefused(
                f"counted repetitions multiply to more than {REPEATS}, or one is over {REPEAT}",
                hint="use + or *, or smaller counts",
            )


def _limits() -> Any:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def vocabulary(tokenizer: Any) -> Any:
    """llguidance's view of the tokenizer, kept on it: building one takes a second for 150,000 tokens."""
    kept = tokenizer.__dict__.get("_luthier_grammar")
    if kept is None:
        from llguidance.hf import from_tokenizer

        kept = from_tokenizer(tokenizer)
        tokenizer.__dict__["_luthier_grammar"] = kept
    return kept


def _said(matcher: Any) -> str:
    said = " ".join(str(matcher.get_error()).split())[:200]
    return said.split(" Enable 'coerce_one_of'")[0]  # the library's own switch, which no request can reach
