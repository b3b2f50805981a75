from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier import template
from luthier.errors import ModelError
from luthier.rendering import Refused
from luthier.rows import Chat, Message, Role, chat, conversation, dicts, pair
from tests.tiny import CHATML, SPECIAL

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20)
TEXTS = WORDS.filter(lambda text: text.strip() == text)
NASTY = st.lists(
    st.one_of(TEXTS, st.sampled_from([*SPECIAL, "\ue000", "\ue0000\ue001", "{", "<|im_"])), min_size=1
)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return template.load_tokenizer(tiny_base)


def talk(*texts: str) -> Chat:
    roles = ("user", "assistant")
    return chat([{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)], "rows.jsonl:7")


def with_template(tiny_base: Path, folder: Path, text: str) -> Any:
    shutil.copytree(tiny_base, folder)
    (folder / "chat_template.jinja").write_text(text)
    return template.load_tokenizer(folder)


@QUIET
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))
def test_rows_without_control_text_get_the_tokens_of_apply_chat_template(
    tokenizer: Any, turns: list[tuple[str, str]]
) -> None:
    row = talk(*(text for turn in turns for text in turn))
    plain = tokenizer.apply_chat_template(dicts(row.messages), tokenize=True, return_dict=False)
    encoded = template.encode(tokenizer, row)
    assert list(encoded.ids) == plain
    assert encoded.id == row.id and len(encoded.mask) == len(encoded.ids)


@QUIET
@given(st.lists(NASTY.map("".join).filter(str.strip), min_size=2, max_size=2))
def test_content_never_becomes_a_control_token_and_comes_back_as_written(
    tokenizer: Any, texts: list[str]
) -> None:
    ids = template.prompt_ids(tokenizer, [Message(Role.USER, texts[0])])
    control = set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    assert [tokenizer.convert_ids_to_tokens(n) for n in ids if n in control] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|im_start|>",
    ]
    expected = CHATML_TEXT.format(texts[0])
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == expected


CHATML_TEXT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def test_what_is_learnt_is_each_answer_and_its_stop_token_and_nothing_after(tokenizer: Any) -> None:
    encoded = template.encode(tokenizer, talk("a", "first", "b", "second"))
    learnt = [n for n, kept in zip(encoded.ids, encoded.mask, strict=True) if kept]
    assert tokenizer.decode(learnt) == "first<|im_end|>second<|im_end|>"
    assert encoded.mask[-1] is False and tokenizer.decode([encoded.ids[-1]]) == "\n"


def test_an_answer_that_spells_the_stop_token_is_learnt_to_its_real_end(tokenizer: Any) -> None:
    encoded = template.encode(tokenizer, talk("q", "say <|im_end|> please"))
    learnt = [n for n, kept in zip(encoded.ids, encoded.mask, strict=True) if kept]
    assert tokenizer.decode(learnt) == "say <|im_end|> please<|im_end|>"
    stops = template.stop_ids(tokenizer)
    assert [n in stops for n in learnt] == [False] * (len(learnt) - 1) + [True]


@QUIET
@given(st.lists(NASTY.map("".join).filter(lambda t: t.strip() == t and t), min_size=2, max_size=6))
def test_many_rows_at_once_equal_each_row_alone(tokenizer: Any, texts: list[str]) -> None:
    rows = [talk(text, "yes") for text in texts]
    assert template.encode_all(tokenizer, rows) == [template.encode(tokenizer, row) for row in rows]


def test_the_serving_prompt_is_the_beginning_of_the_training_row(tokenizer: Any) -> None:
    row = talk("hello <|im_end|>", "fine")
    prompt = template.prompt_ids(tokenizer, row.prompt)
    encoded = template.encode(tokenizer, row)
    assert list(encoded.ids[: len(prompt)]) == prompt and not any(encoded.mask[: len(prompt)])


def test_both_sides_of_a_pair_begin_with_the_serving_prompt_and_are_learnt_behind_it(tokenizer: Any) -> None:
    asked = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "said before"},
        {"role": "user", "content": "two <|im_end|>"},
    ]
    answers = [[{"role": "assistant", "content": text}] for text in ("fine", "no such thing")]
    row = pair(asked, answers[0], answers[1], "rows.jsonl:7")
    ((chosen, rejected),) = template.encode_rows(tokenizer, [row])
    prompt = template.prompt_ids(tokenizer, row.prompt)
    for part, side in enumerate((chosen, rejected)):
        assert (side.part, side.id) == (part, row.id)
        assert list(side.ids[: len(prompt)]) == prompt and not any(side.mask[: len(prompt)])
        assert side.mask[len(prompt)] and tokenizer.eos_token_id in side.ids[len(prompt) :]
    facts = template.check(tokenizer, [row])
    assert facts["rows"] == facts["control_text_rows"] == 1
    assert facts["loss_tokens"] == sum(chosen.mask) + sum(rejected.mask)


def test_check_says_how_much_there_is_to_learn(tokenizer: Any) -> None:
    rows = [talk("a", "b"), talk("what", "a longer answer <|im_start|>")]
    facts = template.check(tokenizer, rows)
    encoded = template.encode_all(tokenizer, rows)
    assert facts["rows"] == 2 and facts["tokens"] == sum(len(row.ids) for row in encoded)
    assert facts["longest"] == len(encoded[1].ids) and facts["mean_loss_tokens"] > 2
    assert facts["control_text_rows"] == 1 and facts["stop"] == ["<|im_end|>"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (CHATML.replace("'<|im_end|>'", "''"), "no stop token"),
        (CHATML.replace("message['content']", "(message['content'] if message['role'] == 'user' else '')"),
         "no token to learn"),
        (CHATML.replace("<|im_start|>assistant", "<|im_start|>bot"), "not begin with the serving prompt"),
        ("{{ raise_exception('no users here') }}", "no users here"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_agree_with_serving_blocks_and_prints_tokens(
    tiny_base: Path, tmp_path: Path, text: str, words: str
) -> None:
    broken = with_template(tiny_base, tmp_path / "base", text)
    with pytest.raises(ModelError, match=words) as caught:
        template.check(broken, [talk("hello", "world")])
    assert caught.value.where == "rows.jsonl:7"
    if "users" not in words:
        assert "'<|im_start|>'" in caught.value.what or "'Ċ'" in caught.value.what


FREE = [
    {"role": role, "content": text}
    for role, text in (
        ("assistant", "Welcome."), ("user", "one"), ("user", "two"), ("assistant", "a"), ("assistant", "b"),
        ("system", "be brief"), ("user", "three"), ("assistant", "c"),
    )
]  # fmt: skip


def test_turns_in_any_order_are_asked_as_the_template_writes_them(tokenizer: Any) -> None:
    asked = template.prompt_ids(tokenizer, conversation(FREE, "request"))
    plain = tokenizer.apply_chat_template(FREE, tokenize=True, return_dict=False, add_generation_prompt=True)
    assert asked == plain


def test_an_order_that_the_template_does_not_take_is_refused_in_its_words(
    tiny_base: Path, tmp_path: Path
) -> None:
    strict = with_template(
        tiny_base, tmp_path / "strict",
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML,
    )  # fmt: skip
    assert template.encode(strict, talk("hi", "yes")).ids
    for messages in (FREE[1:4], FREE[2:5]):
        with pytest.raises(Refused, match=r"refuses this conversation: roles must alternate") as caught:
            template.prompt_ids(strict, conversation(messages, "request"))
        assert caught.value.http_code == 400
    heard = CHATML.replace("{{'<|im_start|>'", "{% if message['role'] != 'system' %}{{'<|im_start|>'", 1)
    heard = heard.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    deaf = with_template(tiny_base, tmp_path / "deaf", heard)
    assert template.prompt_ids(deaf, conversation(FREE[1:5], "request"))
    with pytest.raises(Refused, match="leaves out message 5, the system's"):
        template.prompt_ids(deaf, conversation(FREE[1:], "request"))


def test_a_hostile_template_is_a_named_error_with_the_rows_place(tiny_base: Path, tmp_path: Path) -> None:
    hostile = ("{% for n in range(10**9) %}a{% endfor %}", "{{ 1 / 0 }}", "{{ ''.__class__.__mro__ }}")
    for number, text in enumerate(hostile):
        tokenizer = with_template(tiny_base, tmp_path / str(number), text)
        with pytest.raises(ModelError, match="chat template refuses") as caught:
            template.encode(tokenizer, talk("hi", "yes"))
        assert caught.value.where == "rows.jsonl:7"


def test_a_tokenizer_without_a_template_or_without_files_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        template.load_tokenizer(tmp_path / "base")
    with pytest.raises(ModelError, match="cannot be loaded"):
        template.load_tokenizer(tmp_path / "nothing")
    (tmp_path / "base" / "tokenizer.json").write_text(
        '{"model": {"type": "BPE", "merges": ["a b"], "vocab": {}}}'
    )
    with pytest.raises(ModelError, match="cannot be loaded"):
        template.load_tokenizer(tmp_path / "base")


ALIKE = (
    "{% if tools %}{{ tools|tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}"
    "<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def alike(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer with added tokens that are not special: two that its template writes, one of HTML."""
    made = with_template(tiny_base, tmp_path_factory.mktemp("alike") / "base", ALIKE)
    made.add_tokens(["<tool_response>", "</tool_response>", "<table>"], special_tokens=False)
    return made


def test_added_tokens_that_act_like_control_are_letters_where_they_are_typed(alike: Any) -> None:
    opens, closes, table = alike.convert_tokens_to_ids(["<tool_response>", "</tool_response>", "<table>"])
    for text in ("<tool_response>", "a <tool_response>9</tool_response><|im_end|> <table>"):
        for role in (Role.USER, Role.SYSTEM):
            ids = template.prompt_ids(alike, [Message(role, text)])
            assert opens not in ids and closes not in ids
            assert (table in ids) == ("<table>" in text)
            assert text in alike.decode(ids)
    said = [
        Message(Role.USER, "look"),
        Message(Role.TOOL, "42 </tool_response> no", answers="1"),
    ]
    ids = template.prompt_ids(alike, said)
    assert ids.count(opens) == ids.count(closes) == 1  # the template's own
    assert "</tool_response> no</tool_response>" in alike.decode(ids)


def test_what_a_model_said_itself_stays_as_it_said_it(alike: Any) -> None:
    row = talk("say <tool_response>", "<tool_response>fine")
    encoded = template.encode(alike, row)
    opens = alike.convert_tokens_to_ids("<tool_response>")
    assert [learnt for n, learnt in zip(encoded.ids, encoded.mask, strict=True) if n == opens] == [True]
    prompt = template.prompt_ids(alike, row.messages[:1])
    assert list(encoded.ids[: len(prompt)]) == prompt
    plain = talk("say it", "fine")
    assert list(template.encode(alike, plain).ids) == alike.apply_chat_template(
        dicts(plain.messages), tokenize=True, return_dict=False
    )
