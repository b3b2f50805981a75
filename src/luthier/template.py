"""How a conversation becomes tokens: one path for training, evaluation and serving, and its check.

Source: the chat template inside the tokenizer's own folder (Jinja, rendered in transformers' sandbox).
What is learnt of a row is every answer of the assistant up to and including the stop token, and nothing
after it. The prompt that serving would send for each answer must be the first tokens of the training row, or
the model would be asked something other than what it was taught. Whose turn follows whose in a request is for
the template to say: what it refuses is refused in its words, and so is a later system message that it would
leave out.

Text that merely spells a control token (`<|im_start|>` inside a user's message, a tool's name, arguments,
description or result) is tokenised as ordinary letters, in training and in serving alike, so content can
never open, close or forge a turn. Rows without such text get exactly the tokens of
`tokenizer.apply_chat_template`. Control is what the tokenizer calls special. Other added tokens that look
like control and that the template writes itself (`<tool_call>`, `<think>`) are letters in what users, tools
and systems say; in an assistant's own words they are what they were when it said them.

This module does not know files of rows, batches or models, nor templates that print today's date.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

from luthier.errors import ModelError
from luthier.rendering import RENDERER, Refused, plain
from luthier.rows import Chat, Message, Role, Row, Tools, dicts
from luthier.tool_calls import Convention, convention, turns

CHUNK_ROWS = 1024
TYPED = frozenset({"user", "tool", "system", "developer"})
_ONE_AT_A_TIME = Lock()  # a call with `split_special_tokens` changes the tokenizer while it lasts


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document of a row as tokens. `mask` is true where the token is learnt; `id` is the row's.

    `part` counts the documents of one row from 0: a chat has one, a pair two, the chosen one first.
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    id: str
    part: int = 0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder: from disk alone, and never with code from that folder."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {_first_line(error)}", where=str(folder)
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer has no tokenizer.json", where=str(folder), hint="save it with a fast tokenizer"
        )
    if not tokenizer.chat_template:
        raise ModelError(
            "the tokenizer has no chat template",
            where=str(folder),
            hint="use an instruct model, or add chat_template.jinja to the folder",
        )
    return tokenizer


def stop_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer."""
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer names no eos token, so an answer would never end")
    return frozenset({int(tokenizer.eos_token_id)})


def prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
    """What serving sends: the conversation so far, and the opening of the assistant's next turn."""
    rendered = _render(tokenizer, messages, tools, opened=True, where="prompt", apart=True)
    return _tokens(tokenizer, [rendered])[0]


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """A document as it stands: with the tokens that the tokenizer puts around one, and no control in it."""
    with _ONE_AT_A_TIME:
        return list(tokenizer(text, split_special_tokens=True, verbose=False)["input_ids"])


def encode(tokenizer: Any, chat: Chat) -> Encoded:
    """A training row as tokens and mask; raises `ModelError` where template and row do not agree."""
    return encode_all(tokenizer, [chat])[0]


def encode_all(tokenizer: Any, chats: Sequence[Chat]) -> list[Encoded]:
    """`encode` for many rows, in a few calls to the tokenizer; equal to it row by row."""
    stops = stop_ids(tokenizer)
    found: list[Encoded] = []
    for start in range(0, len(chats), CHUNK_ROWS):
        some = chats[start : start + CHUNK_ROWS]
        texts: list[_Rendered] = []
        for n, chat in enumerate(some):
            # A template that runs away does so on the first row, where it is cut.
            texts.append(
                _render(tokenizer, chat.messages, chat.tools, opened=False, where=chat.where, apart=n == 0)
            )
            texts += [
                _render(tokenizer, chat.messages[:turn], chat.tools, opened=True, where=chat.where)
                for turn in _answers(chat)
            ]
        ids = iter(_tokens(tokenizer, texts))
        for chat in some:
            whole = next(ids)
            found.append(_masked(tokenizer, chat, whole, [next(ids) for _ in _answers(chat)], stops))
    return found


def encode_rows(tokenizer: Any, rows: Sequence[Row]) -> list[tuple[Encoded, ...]]:
    """The documents of each row as tokens; those of one row begin with the same prompt, token by token."""
    encoded = iter(encode_all(tokenizer, [document for row in rows for document in row.documents]))
    return [tuple(replace(next(encoded), part=part) for part in range(len(row.documents))) for row in rows]


def check(tokenizer: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """Prove the template on every row before anything is trained; facts say how much there is to learn."""
    chats = [document for row in rows for document in row.documents]
    asked = [row for row in rows if not row.documents]  # nothing is learnt of them, but they must render
    control, alike = _control_of(tokenizer)
    literal = [
        chat.where for chat in chats if control and _spells(control, [*dicts(chat.messages), *chat.tools])
    ]
    literal += [chat.where for chat in chats if alike and _spells(alike, _typed(dicts(chat.messages)))]
    tokens, learnt, longest, longest_where = 0, 0, 0, ""
    for question in asked:
        ids = prompt_ids(tokenizer, question.prompt)
        tokens += len(ids)
        if len(ids) > longest:
            longest, longest_where = len(ids), question.where
    for start in range(0, len(chats), CHUNK_ROWS):
        some = chats[start : start + CHUNK_ROWS]
        for chat, row in zip(some, encode_all(tokenizer, some), strict=True):
            tokens += len(row.ids)
            learnt += sum(row.mask)
            if len(row.ids) > longest:
                longest, longest_where = len(row.ids), chat.where
    return {
        "rows": len(rows),
        "tokens": tokens,
        "loss_tokens": learnt,
        "mean_loss_tokens": round(learnt / len(chats), 3) if chats else 0.0,
        "longest": longest,
        "longest_where": longest_where,
        "stop": sorted(tokenizer.convert_ids_to_tokens(sorted(stop_ids(tokenizer)))),
        "control_text_rows": len(set(literal)),
        "control_text_where": list(dict.fromkeys(literal))[:10],
    }


def _answers(chat: Chat) -> list[int]:
    """The numbers of the messages to learn."""
    found = enumerate(chat.messages)
    return [n for n, said in found if said.role is Role.ASSISTANT and said.learnt and n >= chat.given]


def _masked(
    tokenizer: Any, chat: Chat, ids: list[int], prompts: list[list[int]], stops: frozenset[int]
) -> Encoded:
    """Mark each answer: from the end of its serving prompt to the first stop token."""
    mask = [False] * len(ids)
    for turn, prompt in zip(_answers(chat), prompts, strict=True):
        start = len(prompt)
        if ids[:start] != prompt:
            raise ModelError(
                f"message {turn + 1}: the training row does not begin with the serving prompt\n"
                + _difference(tokenizer, ids, prompt),
                where=chat.where,
                hint="the chat template must render an answer as prompt + answer + stop token; "
                "an answer that begins with white space can also merge with the prompt",
            )
        end = next((n for n in range(start, len(ids)) if ids[n] in stops), None)
        if end is None:
            wanted = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(sorted(stops))))
            raise ModelError(
                f"message {turn + 1}: no stop token ({wanted}) after the answer: stopping is never learnt\n"
                f"  tokens: {_shown(tokenizer, ids[max(0, start - 4) :])}",
                where=chat.where,
                hint="make the chat template end an assistant turn with the tokenizer's eos token",
            )
        if end == start:
            raise ModelError(
                f"message {turn + 1}: the answer has no token to learn\n"
                f"  tokens: {_shown(tokenizer, ids[max(0, start - 4) :])}",
                where=chat.where,
                hint="the chat template drops this answer",
            )
        mask[start : end + 1] = [True] * (end + 1 - start)
    return Encoded(tuple(ids), tuple(mask), chat.id)


def _difference(tokenizer: Any, ids: list[int], prompt: list[int]) -> str:
    at = next(
        (n for n, (a, b) in enumerate(zip(ids, prompt, strict=False)) if a != b), min(len(ids), len(prompt))
    )
    near = slice(max(0, at - 4), at + 8)
    return (
        f"  first difference at token {at}\n"
        f"  serving:  {_shown(tokenizer, prompt[near])}\n  training: {_shown(tokenizer, ids[near])}"
    )


def _shown(tokenizer: Any, ids: list[int]) -> str:
    cut = ids[:24]
    return " ".join(f"{token!r}" for token in tokenizer.convert_ids_to_tokens(cut)) + (
        " …" if ids[24:] else ""
    )


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A rendered conversation. `hidden`: each stand-in, and the control-like text it stands for. `cut`: where
    the tokenizer must not see a text as one."""

    text: str
    hidden: tuple[tuple[str, str], ...] = ()
    cut: str = ""


Controls = tuple[re.Pattern[str] | None, re.Pattern[str] | None]


def _control(tokenizer: Any) -> Controls:
    """Finds the text of any special token of this tokenizer; and that of added tokens that only act like one.

    The second are `<…>` that the chat template writes; a tokenizer's words of HTML or white space are words.
    """
    added = tokenizer.added_tokens_decoder.values()
    names = {str(token) for token in tokenizer.all_special_tokens}
    names |= {token.content for token in added if token.special}
    written = str(tokenizer.chat_template)
    alike = {token.content for token in added if _ALIKE.fullmatch(token.content)}
    return _any_of(names), _any_of({name for name in alike - names if name in written})


_ALIKE = re.compile(r"<[^\s<>][^\s<>]*>")


def _any_of(names: set[str]) -> re.Pattern[str] | None:
    ordered = sorted((name for name in names if name), key=lambda name: (-len(name), name))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _render(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Tools,
    *,
    opened: bool,
    where: str,
    apart: bool = False,
) -> _Rendered:
    """`apart`: a template that could run away is rendered where it can be cut."""
    from jinja2 import TemplateError

    control, alike = _control_of(tokenizer)
    said: list[Any] = turns(messages, tools, how := convention(tokenizer.chat_template))
    offered: list[Any] | None = [*tools] if tools and how is not Convention.DESCRIBED else None
    hidden: dict[str, str] = {}
    edge = _edge([said, offered])
    if alike and _spells(alike, _typed(said)):
        said = [_hide(turn, alike, hidden, edge) if turn["role"] in TYPED else turn for turn in said]
        hidden = {name: f"{text[0]}{edge}\ue002{text[1:]}" for name, text in hidden.items()}
    if control and _spells(control, [said, offered]):
        said, offered = _hide([said, offered], control, hidden, edge)
    try:
        text = (_apart if apart else _here)(tokenizer, said, offered, opened)
    except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise Refused(_first_line(error), where) from error
    except Refused as error:
        raise Refused(error.said, where) from error
    except ModelError as error:  # from the child that renders
        raise type(error)(error.what, where=where) from error
    for n, turn in enumerate(said[1:], 2):  # some templates read a system message in the first place alone
        if turn["role"] == "system" and turn["content"].strip() not in text:
            raise Refused(f"it leaves out message {n}, the system's", where)
    return _Rendered(text, tuple(hidden.items()), f"{edge}\ue002")


def _here(tokenizer: Any, said: list[Any], offered: list[Any] | None, opened: bool) -> str:
    return str(
        tokenizer.apply_chat_template(said, tools=offered, tokenize=False, add_generation_prompt=opened)
    )


def _apart(tokenizer: Any, said: list[Any], offered: list[Any] | None, opened: bool) -> str:
    """The same from a child process, where the template could run away."""
    chosen = tokenizer.get_chat_template(None, offered)
    if plain(chosen):
        return _here(tokenizer, said, offered, opened)
    values = {"conversations": [said], "tools": offered, "add_generation_prompt": opened}
    return RENDERER.render(chosen, tokenizer.special_tokens_map | values)


def _control_of(tokenizer: Any) -> Controls:
    """`_control`, kept on the tokenizer: building it costs more than rendering a row."""
    kept: tuple[Any, Controls] | None = tokenizer.__dict__.get("_luthier_control")
    if kept is None or kept[0] != tokenizer.chat_template:
        kept = (tokenizer.chat_template, _control(tokenizer))
        tokenizer.__dict__["_luthier_control"] = kept
    return kept[1]


def _typed(said: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The turns that a model did not say."""
    return [turn for turn in said if turn["role"] in TYPED]


def _texts(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, held in value.items():
            yield str(name)
            yield from _texts(held)
    elif isinstance(value, list | tuple):
        for held in value:
            yield from _texts(held)


def _spells(control: re.Pattern[str], value: Any) -> bool:
    return any(control.search(text) for text in _texts(value))


def _edge(value: Any) -> str:
    """Private-use letters that are nowhere in it."""
    edge = "\ue000"
    while any(edge in text for text in _texts(value)):
        edge += "\ue000"
    return edge


def _hide(value: Any, control: re.Pattern[str], hidden: dict[str, str], edge: str) -> Any:
    """Put stand-ins that begin with `edge` where a text spells a control token."""

    def stand_in(match: re.Match[str]) -> str:
        name = f"{edge}{len(hidden)}\ue001"
        hidden[name] = match[0]
        return name

    def put(held: Any) -> Any:
        if isinstance(held, str):
            return control.sub(stand_in, held)
        if isinstance(held, Mapping):
            return {put(name): inner if name == "role" else put(inner) for name, inner in held.items()}
        return [put(inner) for inner in held] if isinstance(held, list | tuple) else held

    return put(value)


def _tokens(tokenizer: Any, rendered: Sequence[_Rendered]) -> list[list[int]]:
    plain = [item.text for item in rendered if not item.hidden]
    with _ONE_AT_A_TIME:
        ids = iter(tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else [])
        return [_literal(tokenizer, item) if item.hidden else list(next(ids)) for item in rendered]


def _literal(tokenizer: Any, rendered: _Rendered) -> list[int]:
    """Tokens where content spells control tokens: the template's own are control, content's are letters."""
    control, _ = _control_of(tokenizer)
    ids: list[int] = []
    at = 0
    for match in [*(control.finditer(rendered.text) if control else ()), None]:
        stretch = rendered.text[at : match.start() if match else None]
        for name, original in rendered.hidden:
            stretch = stretch.replace(name, original)
        for piece in filter(None, stretch.split(rendered.cut)):
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                "input_ids"
            ]
        if match:
            ids.append(int(tokenizer.convert_tokens_to_ids(match[0])))
            at = match.end()
    return ids


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
