"""A formula over named scores: numbers, names, + - * / ^, parentheses, and a closed set of functions.

Source: `calculate_output` of OpenAI's multi grader. Read by recursive descent into a tree of tuples and
walked; Python's evaluator is never asked. Precedence: ^ (to the right), signs, * and /, + and -. Length and
depth are bounded. Real numbers only: an undefined or endless result is an error. It does not know graders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from luthier.errors import GraderError

LONGEST, DEEPEST = 2000, 40
MOST_TOKENS = 200  # a sum of many terms is a tree as deep as it has terms
FUNCTIONS: dict[str, tuple[Callable[..., float], int | None]] = {
    "min": (min, None), "max": (max, None), "abs": (abs, 1), "floor": (math.floor, 1),
    "ceil": (math.ceil, 1), "exp": (math.exp, 1), "sqrt": (math.sqrt, 1), "log": (math.log, 1),
}  # fmt: skip
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|([A-Za-z_]\w*)|([-+*/^(),]))")
_OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "^": math.pow,
}  # fmt: skip

Tree = tuple[Any, ...]


class BadFormula(GraderError):
    """The text is no formula, or it has no value for these scores."""

    flag = "formula_parse_error"


@lru_cache(maxsize=256)
def parse(text: str) -> Tree:
    """The formula as a tree; raise `BadFormula` naming the place where it stops being one."""
    if len(text) > LONGEST:
        raise BadFormula(f"the formula is longer than {LONGEST} characters")
    tokens = _tokens(text)
    if len(tokens) > MOST_TOKENS:
        raise BadFormula(f"the formula has more than {MOST_TOKENS} names, numbers and signs")
    reader = _Reader(tokens)
    tree = reader.sum(0)
    if reader.at < len(reader.tokens):
        raise BadFormula(f"{reader.tokens[reader.at][1]!r} does not go on from what stands before it")
    return tree


def names(tree: Tree) -> set[str]:
    """The scores that a formula reads."""
    if tree[0] == "name":
        return {tree[1]}
    return set().union(*(names(part) for part in tree[1:] if isinstance(part, tuple)))


def value(tree: Tree, scores: Mapping[str, float]) -> float:
    """What the formula says of these scores."""
    try:
        found = float(_value(tree, scores))
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise BadFormula(f"the formula has no value for {dict(scores)}: {error}") from error
    if not math.isfinite(found):
        raise BadFormula(f"the formula is {found} for {dict(scores)}")
    return found


def _value(tree: Tree, scores: Mapping[str, float]) -> float:
    kind, *parts = tree
    if kind == "number":
        return float(parts[0])
    if kind == "name":
        return scores[parts[0]]
    values = [_value(part, scores) for part in parts[1:]]
    return FUNCTIONS[parts[0]][0](*values) if kind == "call" else _OPERATIONS[parts[0]](*values)


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise BadFormula(f"{text[at:].strip()[:1]!r} is nothing a formula may hold")
        kind = ("number", "name", "sign")[next(n for n in range(3) if match[n + 1] is not None)]
        found.append((kind, match[0].strip()))
        at = match.end()
    return found


class _Reader:
    """Where the reading stands; each method reads one rule of the grammar and returns its tree."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.at = tokens, 0

    def next(self, *signs: str) -> str | None:
        """Take the next token if it is one of these signs."""
        if self.at < len(self.tokens) and self.tokens[self.at][1] in signs:
            self.at += 1
            return self.tokens[self.at - 1][1]
        return None

    def sum(self, depth: int) -> Tree:
        tree = self.product(depth)
        while sign := self.next("+", "-"):
            tree = ("apply", sign, tree, self.product(depth))
        return tree

    def product(self, depth: int) -> Tree:
        tree = self.signed(depth)
        while sign := self.next("*", "/"):
            tree = ("apply", sign, tree, self.signed(depth))
        return tree

    def signed(self, depth: int) -> Tree:
        if depth > DEEPEST:
            raise BadFormula(f"the formula is nested deeper than {DEEPEST}")
        if sign := self.next("-", "+"):
            return ("apply", sign, ("number", 0.0), self.signed(depth + 1))
        tree = self.atom(depth)
        return ("apply", "^", tree, self.signed(depth + 1)) if self.next("^") else tree

    def atom(self, depth: int) -> Tree:
        if self.next("("):
            return self.closed(self.sum(depth + 1))
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else ("end", "the end")
        if kind not in ("number", "name"):
            raise BadFormula(f"a number or a name was expected, not {text!r}")
        self.at += 1
        if kind == "number":
            return ("number", float(text))
        if not self.next("("):
            return ("name", text)
        function = FUNCTIONS.get(text)
        if function is None:
            raise BadFormula(f"unknown function {text!r}; there are {', '.join(FUNCTIONS)}")
        inside = [self.sum(depth + 1)]
        while self.next(","):
            inside.append(self.sum(depth + 1))
        if len(inside) != function[1] and (function[1] is not None or len(inside) < 2):
            raise BadFormula(f"{text} takes {function[1] or 'two or more'} value(s), not {len(inside)}")
        return self.closed(("call", text, *inside))

    def closed(self, tree: Tree) -> Tree:
        if not self.next(")"):
            raise BadFormula("a parenthesis is not closed")
        return tree
