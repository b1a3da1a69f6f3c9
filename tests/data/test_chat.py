"""Conversations of every dialect, and the tokens of the assistant's turns by mask and by prefixes."""

from __future__ import annotations

import pytest
import transformers as hf
from chats import byte_tokenizer, targets

import influence_fast as inf
from influence_fast.data.chat import ChatEncoder, messages_of

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An answer is written with an empty thought as long as it is the last.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "hi?"},
    {"role": "assistant", "content": "yes, hi"},
]


@pytest.fixture(scope="module")
def tokenizer() -> hf.PreTrainedTokenizerFast:
    return byte_tokenizer(["<|im_start|>"], eos_token="<|im_end|>")


def of_talk(tokenizer: hf.PreTrainedTokenizerFast, template: str, talk: list = TALK, **how: int) -> tuple[str, str]:
    return targets(tokenizer, template, talk, **how)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_the_loss_is_on_the_assistants_turns(tokenizer: hf.PreTrainedTokenizerFast, template: str) -> None:
    text, told = of_talk(tokenizer, template)
    assert text == tokenizer.apply_chat_template(TALK, chat_template=PLAIN, tokenize=False)
    assert told == "hi<|im_end|>\n|yes, hi<|im_end|>\n"


def test_a_template_of_the_tokenizer_is_used(tokenizer: hf.PreTrainedTokenizerFast) -> None:
    with pytest.raises(inf.InputError, match=r"the tokenizer has none.*--chat-template FILE"):
        ChatEncoder(tokenizer)
    tokenizer.chat_template = PLAIN
    try:
        assert ChatEncoder(tokenizer)(TALK) == ChatEncoder(tokenizer, PLAIN)(TALK)
    finally:
        tokenizer.chat_template = None


def test_turns_that_change_once_more_follow(tokenizer: hf.PreTrainedTokenizerFast) -> None:
    text, told = of_talk(tokenizer, THINKING)
    assert "assistant\nhi<" in text
    assert told == "hi<|im_end|>|<think></think>yes, hi<|im_end|>\n"


def test_some_turns_are_context(tokenizer: hf.PreTrainedTokenizerFast) -> None:
    quiet = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]
    for template in (PLAIN, MARKED):
        assert of_talk(tokenizer, template, quiet)[1] == "yes, hi<|im_end|>\n"
    assert of_talk(tokenizer, PLAIN, begin=3)[1] == "yes, hi<|im_end|>\n"


def test_a_slow_tokenizer_finds_the_same(
    tokenizer: hf.PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = ChatEncoder(tokenizer, PLAIN)(TALK)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert ChatEncoder(tokenizer, PLAIN)(TALK) == fast


def test_dialects() -> None:
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for talk in (
        wanted,
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"role": "User", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": ["b"]}],
    ):
        assert messages_of(talk) == wanted
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert messages_of([called]) == [{**called, "content": ""}]


@pytest.mark.parametrize(
    ("talk", "message"),
    [
        (None, "has no conversation"),
        ("hello", "has no conversation"),
        ([], "has no conversation"),
        (["hello"], "a message 0 that is a str"),
        ([{"content": "a"}], "a message 0 without a role"),
        ([{"role": "user", "content": None}], r"a message 0 \(user\) without content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'"),
        ([{"role": "user", "content": 3}], "whose content is a int"),
    ],
)
def test_what_is_no_conversation_is_said(talk: object, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        messages_of(talk)


def test_what_cannot_be_learned_from_is_said(tokenizer: hf.PreTrainedTokenizerFast) -> None:
    with pytest.raises(inf.InputError, match="no turn of the assistant"):
        ChatEncoder(tokenizer, PLAIN)(TALK[:2])
    with pytest.raises(inf.InputError, match=r"refused by the chat template .*no system"):
        ChatEncoder(tokenizer, "{{ raise_exception('no system') }}")(TALK)
    with pytest.raises(inf.InputError, match="a turn 2 that cannot be found"):
        ChatEncoder(tokenizer, "{% for m in messages %}{{ m.content | upper }}{% endfor %}")(TALK)
