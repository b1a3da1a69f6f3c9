"""The templates of families that people fine-tune, each in its own few lines: what is learned of the same conversations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import pytest
from chats import byte_tokenizer, targets

import influence_fast as inf
from influence_fast.data.loading import read_table
from influence_fast.data.samples import prepare
from influence_fast.data.settings import DataSettings

ASK = "{% if add_generation_prompt %}"
ALTERNATE = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
FOLDED = "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set talk = messages[1:] %}"
FOLDED += "{% else %}{% set system = '' %}{% set talk = messages %}{% endif %}"


@dataclass(frozen=True)
class Family:
    """A template, its marks, how turns end, and whether it takes a system's message."""

    template: str
    special: tuple[str, ...]
    end: str
    last: str | None = None
    first: str = ""
    system: bool = True
    alternates: bool = False

    def told(self, *answers: str) -> str:
        """What is learned of a conversation with these answers."""
        ends = [self.end] * (len(answers) - 1) + [self.end if self.last is None else self.last]
        return "|".join(f"{self.first}{answer}{end}" for answer, end in zip(answers, ends, strict=True))


def chatml(before: str = "", answer: str = "m.content") -> str:
    return (
        before + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ " + answer + " }}{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + ASK + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


IM = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama-2": Family(
        ALTERNATE + FOLDED + "{% for m in talk %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if loop.first and system %}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}"
        "{{ m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        (),
        " </s>",
        first=" ",
        alternates=True,
    ),
    "llama-3": Family(
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n'"
        " + (m.content | trim)"
        " + '<|eot_id|>' }}{% endfor %}" + ASK + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    # The system's words stand before the last question, and so move with each question that follows.
    "mistral": Family(
        ALTERNATE + FOLDED + "{{ bos_token }}{% for m in talk %}{% if m.role == 'user' %}{{ '[INST] ' }}"
        "{% if loop.index0 == talk | rejectattr('role', 'equalto', 'assistant') | list | length * 2 - 2 and system %}"
        "{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
        "{% endfor %}",
        ("[INST]", "[/INST]"),
        "</s>",
        first=" ",
        alternates=True,
    ),
    "chatml": Family(chatml(), IM, "<|im_end|>\n"),
    "qwen-2.5": Family(
        chatml("{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"),
        IM,
        "<|im_end|>\n",
    ),
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + ALTERNATE
        + "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
        " + (m.content | trim) + '<end_of_turn>\n' }}{% endfor %}" + ASK + "{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>\n",
        system=False,
        alternates=True,
    ),
    # Where no answer is asked for the text ends with an end of text, which no earlier turn has.
    "phi-3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        + ASK
        + "{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
        "<|end|>\n",
        "<|end|>\n</s>",
    ),
    "phi-4": Family(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        + ASK
        + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        (*IM, "<|im_sep|>"),
        "<|im_end|>",
    ),
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}{{ '\n' }}{% endfor %}"
        + ASK
        + "{{ '<|assistant|>' }}{% endif %}",
        (),
        "</s>\n",
        first="\n",
    ),
    "deepseek": Family(
        FOLDED
        + "{{ bos_token + system }}{% for m in talk %}{% if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}"
        "{% else %}{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        + ASK
        + "{{ '<\uff5cAssistant\uff5c>' }}{% endif %}",
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
        "</s>",
    ),
    # The last answer ends in another token than those before it.
    "gpt-oss": Family(
        "{% for m in messages %}{{ '<|start|>' + m.role }}{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}{% endfor %}"
        + ASK
        + "{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|end|>",
        "<|return|>",
        first="<|channel|>final<|message|>",
    ),
}
# Thoughts and empty thoughts stand in the answers behind the last question alone, and calls of tools are written out.
QWEN3 = (
    "{% set asked = namespace(at=0) %}{% for m in messages if m.role == 'user' %}{% set asked.at = m %}{% endfor %}"
    "{% set behind = namespace(here=false) %}{% for m in messages %}"
    "{% if m == asked.at %}{% set behind.here = true %}{% endif %}"
    "{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip('\n')"
    " if '</think>' in m.content else '') %}{{ '<|im_start|>assistant\n' }}"
    "{% if behind.here and (loop.last or thought) %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ said }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    + ASK
    + "{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SYSTEM = {"role": "system", "content": "be short"}
HELLO, AGAIN, END = ({"role": "user", "content": text} for text in ("hello", "hi?", "end"))
HI, YES, ENDED = ({"role": "assistant", "content": text} for text in ("hi", "yes, hi", "end"))


def tokenizer_of(family: Family) -> Any:
    return byte_tokenizer(family.special, bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> tuple[Family, Any]:
    found = FAMILIES[request.param]
    return found, tokenizer_of(found)


def test_every_answer_and_what_ends_it_is_learned_and_nothing_else(family: tuple[Family, Any]) -> None:
    one, tokenizer = family
    for begin in ([], [SYSTEM]) if one.system else ([],):
        talk = [*begin, HELLO, HI, AGAIN, YES]
        text, told = targets(tokenizer, one.template, talk)
        assert text == tokenizer.apply_chat_template(talk, chat_template=one.template, tokenize=False)
        assert told == one.told("hi", "yes, hi")
    # Words that stand in the marks too, and an answer that is the question.
    assert targets(tokenizer, one.template, [HELLO, HI, END, ENDED, END, ENDED])[1] == one.told("hi", "end", "end")


def test_a_question_at_the_end_is_context(family: tuple[Family, Any]) -> None:
    one, tokenizer = family
    told = targets(tokenizer, one.template, [HELLO, HI, AGAIN])[1]
    assert told.startswith(one.first + "hi")
    assert one.end.startswith(told.removeprefix(one.first + "hi"))
    assert one.end.strip() in told


def test_an_empty_system_message_and_contents_in_parts_change_nothing_of_what_is_learned(
    family: tuple[Family, Any],
) -> None:
    one, tokenizer = family
    parts = [{**HELLO, "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}, HI]
    assert targets(tokenizer, one.template, parts) == targets(tokenizer, one.template, [HELLO, HI])
    if one.system:
        empty = {"role": "system", "content": ""}
        assert targets(tokenizer, one.template, [empty, HELLO, HI])[1] == one.told("hi")


def test_a_greeting_of_the_assistant_is_learned_without_what_the_template_writes_before(
    family: tuple[Family, Any],
) -> None:
    one, tokenizer = family
    talk = [{"role": "assistant", "content": "welcome"}, HELLO, HI]
    if one.alternates:
        with pytest.raises(inf.InputError, match=r"refused by the chat template .*roles must alternate"):
            targets(tokenizer, one.template, talk)
        return
    told = targets(tokenizer, one.template, talk)[1]
    # By its content alone: nothing before it tells the template's words from the assistant's.
    assert told == f"welcome{one.end.strip()}|{one.told('hi')}"


def test_roles_that_a_template_refuses() -> None:
    one = FAMILIES["gemma"]
    tokenizer = tokenizer_of(one)
    with pytest.raises(inf.InputError, match=r"refused by the chat template .*System role not supported"):
        targets(tokenizer, one.template, [SYSTEM, HELLO, HI])
    with pytest.raises(inf.InputError, match=r"refused by the chat template .*roles must alternate"):
        targets(tokenizer, one.template, [HELLO, AGAIN, HI])


def test_answers_that_follow_each_other_are_learned_both() -> None:
    for name in ("llama-3", "chatml", "phi-3", "phi-4"):
        one = FAMILIES[name]
        told = targets(tokenizer_of(one), one.template, [HELLO, HI, YES])[1]
        assert told == one.told("hi", "yes, hi")


THINKER = Family(QWEN3, (*IM, "<tool_call>", "</tool_call>", "<think>", "</think>"), "")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def thoughtful(talk: list[dict[str, Any]], tools: Any = None) -> str:
    return targets(tokenizer_of(THINKER), THINKER.template, talk, tools)[1]


def test_earlier_thoughts_that_the_template_leaves_out_are_not_looked_for() -> None:
    hi, yes = ({**a, "content": f"<think>\nhm\n</think>\n\n{a['content']}"} for a in (HI, YES))
    # An earlier turn is found by what it says, with the token that ends it.
    assert thoughtful([HELLO, HI, AGAIN, YES]) == "hi<|im_end|>|<think>\n\n</think>\n\nyes, hi<|im_end|>\n"
    assert thoughtful([HELLO, hi, AGAIN, yes]) == "hi<|im_end|>|<think>\nhm\n</think>\n\nyes, hi<|im_end|>\n"
    reasons = [HELLO, {**HI, "reasoning_content": "hm"}, AGAIN, {**YES, "reasoning_content": "hm"}]
    assert thoughtful(reasons) == "hi<|im_end|>|<think>\nhm\n</think>\n\nyes, hi<|im_end|>\n"


# A call has no content, and its arguments are text; an answer to what a tool says has no mark of its own before it.
DEEPSEEK_TOOLS = (
    "{% set ns = namespace(told=false) %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<User>' + m.content }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is none %}{{ '<Assistant><calls>' }}{% for call in m.tool_calls %}"
    "{{ '<call>' + call.type + '<sep>' + call.function.name + '\n```json\n' + call.function.arguments + '\n```</call>' }}"
    "{% endfor %}{{ '</calls>' + eos_token }}{% endif %}"
    "{% if m.role == 'assistant' and m.content is not none %}{% if ns.told %}{% set ns.told = false %}"
    "{{ '</outputs>' + m.content + eos_token }}{% else %}{{ '<Assistant>' + m.content + eos_token }}{% endif %}{% endif %}"
    "{% if m.role == 'tool' %}{% set ns.told = true %}{{ '<output>' + m.content }}{% endif %}{% endfor %}"
    "{% if ns.told %}{{ '</outputs>' }}{% elif add_generation_prompt %}{{ '<Assistant>' }}{% endif %}"
)
DEEPSEEK_MARKS = (
    "<User>",
    "<Assistant>",
    "<calls>",
    "</calls>",
    "<call>",
    "</call>",
    "<sep>",
    "<output>",
    "</outputs>",
)


@pytest.mark.parametrize("content", [None, ""])
@pytest.mark.parametrize("given", [{"city": "K\u00f6ln", "days": 2}, '{"city": "K\u00f6ln", "days": 2}'])
def test_calls_have_the_form_that_the_template_takes(given: Any, content: Any) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": given}}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    asks = {"role": "assistant", "content": content, "tool_calls": [call]}
    talk = [HELLO, asks, {"role": "tool", "content": "3 weather"}, YES, AGAIN, HI]
    tokenizer = tokenizer_of(Family(DEEPSEEK_TOOLS, DEEPSEEK_MARKS, "</s>"))
    text, told = targets(tokenizer, DEEPSEEK_TOOLS, talk, tools)
    json_text = '{"city": "K\u00f6ln", "days": 2}'
    called = f"<calls><call>function<sep>weather\n```json\n{json_text}\n```</call></calls></s>"
    assert told == f"{called}|yes, hi</s>|hi</s>"
    assert text == f"<s><User>hello<Assistant>{called}<output>3 weather</outputs>yes, hi</s><User>hi?<Assistant>hi</s>"
    # The other way round: entries of an object.
    items = chatml(
        answer="m.content + (m.tool_calls[0].function.arguments.items() | list)[0][1] if m.tool_calls else m.content"
    )
    with_name = items.replace("m.content + (", "m.tool_calls[0].function.name + (")
    assert targets(tokenizer_of(FAMILIES["chatml"]), with_name, talk)[1].startswith("weatherK\u00f6ln<|im_end|>")


def test_calls_of_tools_are_learned_and_their_answers_are_not() -> None:
    talk = [HELLO, {**HI, "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, YES]
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
    assert thoughtful(talk) == f"{called}|<think>\n\n</think>\n\nyes, hi<|im_end|>\n"
    both = [*talk[:1], {**talk[1], "content": "let me see "}, *talk[2:]]
    assert thoughtful(both) == f"let me see {called}|<think>\n\n</think>\n\nyes, hi<|im_end|>\n"
    plain = FAMILIES["chatml"]
    with pytest.raises(inf.InputError, match="a turn 1 that calls the tool 'add', which the chat template leaves out"):
        targets(tokenizer_of(plain), plain.template, talk)


def test_a_template_that_writes_an_opened_thought_into_the_question() -> None:
    opened = chatml().replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    one = Family(opened, THINKER.special, "")
    talk = [HELLO, {**HI, "content": "<think>\nhm\n</think>\n\nhi"}]
    assert targets(tokenizer_of(one), opened, talk)[1] == "hm\n</think>\n\nhi<|im_end|>\n"


def test_blanks_that_are_tokens_of_their_own_end_no_turn() -> None:
    one = FAMILIES["gpt-oss"]
    tokenizer = byte_tokenizer((*one.special, "\n\n", "  "), eos_token="</s>")
    talk = [HELLO, {**HI, "content": "hi\n\n"}, AGAIN, YES]
    assert targets(tokenizer, one.template, talk)[1] == one.told("hi\n\n", "yes, hi")


def test_marks_of_what_is_generated_say_the_same_as_prefixes() -> None:
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    for talk in ([HELLO, HI], [SYSTEM, HELLO, HI, AGAIN, YES], [HELLO, HI, YES], [HELLO, HI, AGAIN]):
        assert targets(tokenizer, marked, talk) == targets(tokenizer, chatml(), talk)


def test_rows_that_a_template_refuses_are_named(tmp_path: Path) -> None:
    one = FAMILIES["gemma"]
    tokenizer = tokenizer_of(one)
    tokenizer.chat_template = one.template
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in ([HELLO, HI], [HELLO, AGAIN, HI])))
    model = models.make("llama", "causal")
    model.config.vocab_size = len(tokenizer)
    table, given = read_table("train", str(file)), DataSettings()
    with pytest.raises(
        inf.InputError, match=r"row 1 \(chats.jsonl, line 2\) is refused by the chat template .*alternate"
    ):
        prepare("train", table, given, "causal-lm", model, tokenizer)


def test_a_conversation_that_is_too_long_is_refused_or_cut_and_keeps_its_first_targets() -> None:
    one = FAMILIES["llama-3"]
    tokenizer = tokenizer_of(one)
    tokenizer.chat_template, tokenizer.model_max_length = one.template, 40
    model = models.make("llama", "causal")
    table = read_table("train", [{"messages": [HELLO, HI, AGAIN, YES]}, {"messages": [HELLO, HI]}])
    with pytest.raises(inf.InputError, match="row 0"):
        prepare("train", table, DataSettings(), "causal-lm", model, tokenizer)
    cut = prepare("train", table, DataSettings(truncate=True), "causal-lm", model, tokenizer).rows[0]
    assert len(cut["input_ids"]) == 40
    assert tokenizer.decode([token for token in cut["labels"] if token != -100]) == "hi<|eot_id|>"
