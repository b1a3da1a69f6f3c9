"""Conversations become tokens by the tokenizer's chat template, with the assistant's turns as targets.

Where the template marks what the assistant generates (``{% generation %}``) its mask says which tokens those are. Where not,
a turn begins where the conversation before it ends, asked for an answer, and ends where the conversation with it ends.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from influence_fast.errors import InputError

ASSISTANT = "assistant"
_ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": ASSISTANT,
    "bot": ASSISTANT,
    "model": ASSISTANT,
    "chatgpt": ASSISTANT,
    "function_call": ASSISTANT,
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
}
_GENERATION = re.compile(r"\{%-?\+?\s*generation\b")
Message = dict[str, Any]


class RowError(InputError):
    """What is wrong with one row, as the end of a sentence that begins with the row.

    ``empty``: whether there is nothing where a text, an answer or a label should be.
    """

    def __init__(self, reason: str, empty: bool = False) -> None:
        super().__init__(reason)
        self.empty = empty


def messages_of(value: Any) -> list[Message]:
    """A conversation with ``role`` and ``content``, whatever dialect it is written in.

    Raises:
        RowError: no list of messages, nor the text of a JSON list; content that is no text, such as images.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"has a conversation that is no JSON ({error})") from None
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError("has no conversation, a list of messages")
    return [_message(place, message) for place, message in enumerate(value)]


def turns(prompt: str, answer: str) -> list[dict[str, Any]]:
    """A prompt and its answer as two messages."""
    return [{"role": "user", "content": prompt}, {"role": ASSISTANT, "content": answer}]


def turns_of(value: Any, role: str) -> list[dict[str, Any]]:
    """Messages as they are; a text as one of ``role``."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return messages_of(value)


def tools_of(row: dict[str, Any]) -> Any:
    """The tools of a conversation, which some files hold as the text of a JSON list."""
    tools = row.get("tools")
    if not isinstance(tools, str):
        return tools
    try:
        return json.loads(tools)
    except ValueError as error:
        raise RowError(f"has tools that are no JSON ({error})") from None


def _message(place: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise RowError(f"has a message {place} that is a {type(message).__name__}, expected role and content")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise RowError(f"has a message {place} without a role")
    content = message.get("content", message.get("value"))
    # What else a message holds (tool calls, a name, reasoning) is the template's; absent values are none.
    extra = {k: v for k, v in message.items() if k not in ("role", "from", "content", "value") and v is not None}
    if content is None and not extra:
        raise RowError(f"has a message {place} ({role}) without content")
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": _text(place, content), **extra}


def _text(place: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = []
        for part in content:
            text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                raise RowError(f"has a message {place} with a part of type {kind!r}; parts that are text can be read")
            parts.append(text)
        return "".join(parts)
    raise RowError(f"has a message {place} whose content is a {type(content).__name__}, expected text")


@dataclass
class ChatEncoder:
    """Conversations to ``(input_ids, is_target)``.

    Args:
        tokenizer: its template is used unless ``template``, the text of another, is given.

    Raises:
        InputError: neither has a template.
    """

    tokenizer: Any
    template: str | None = None
    _marks: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                "chat_template: the tokenizer has none, so conversations cannot become tokens; give the file of the one "
                "that the model was trained with (--chat-template FILE)"
            )
        own = self.tokenizer.chat_template
        text = self.template or (own if isinstance(own, str) else own.get("default", "") if own else "")
        self._marks = bool(_GENERATION.search(text))

    def __call__(self, messages: list[Message], tools: Any = None, begin: int = 0) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them an assistant wrote in message ``begin`` or later.

        Raises:
            RowError: no turn of the assistant; a template that refuses the conversation, or writes a turn in another way
                once more follow.
        """
        # A weight of 0 is how some files say that a turn is context alone.
        spoken = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT]
        turns = [place for place in spoken if place >= begin and messages[place].get("weight", 1)]
        if not turns:
            raise RowError("has no turn of the assistant, so nothing to learn from")
        problem: RowError | None = None
        for form in _forms(messages):
            try:
                return (
                    self._by_mask(form, tools) if self._marks and turns == spoken else self._found(form, turns, tools)
                )
            except RowError as error:
                problem = problem or error
        assert problem is not None
        raise problem

    def _found(self, messages: list[Message], turns: Sequence[int], tools: Any) -> tuple[list[int], list[bool]]:
        """By where each turn stands in the text."""
        text = self._render(messages, tools)
        fast = getattr(self.tokenizer, "is_fast", False)
        offsets = {"return_offsets_mapping": True} if fast else {}
        found = self.tokenizer(text, add_special_tokens=False, verbose=False, **offsets)
        # Those that stand in the text alone: some vocabularies have thousands.
        special = sorted({self._added[i] for i in found["input_ids"] if i in self._added}, key=len, reverse=True)
        spans = [self._span(text, messages, turn, tools, special) for turn in turns]
        if fast:
            # A token belongs to the turn that its first character is in.
            starts = [begin for begin, _ in found["offset_mapping"]]
            return found["input_ids"], [any(b <= start < e for b, e in spans) for start in starts]
        return self._tokens(text, spans)

    def _by_mask(self, messages: list[Message], tools: Any) -> tuple[list[int], list[bool]]:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = self._apply(messages, tools, **options)
        ids, mask = list(found["input_ids"]), [bool(value) for value in found["assistant_masks"]]
        if not any(mask):
            raise RowError("has no token that the chat template marks as generated")
        return ids, mask

    def _render(self, messages: list[Message], tools: Any, ask: bool = False) -> str:
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=ask)

    def _apply(self, messages: list[Message], tools: Any, **options: Any) -> Any:
        import jinja2
        from transformers.utils import chat_template_utils

        # Some templates tell a call by a content of none, which later versions of apply_chat_template leave out.
        render = getattr(chat_template_utils, "render_jinja_template", None)
        given = {"chat_template": self.template} if self.template is not None else {}
        try:
            if (
                render is not None
                and any(message["content"] is None for message in messages)
                and not options["tokenize"]
            ):
                marks, ask = self.tokenizer.special_tokens_map, options["add_generation_prompt"]
                template = self.tokenizer.get_chat_template(self.template, tools or None)
                return render([messages], tools or None, chat_template=template, add_generation_prompt=ask, **marks)[0][
                    0
                ]
            return self.tokenizer.apply_chat_template(messages, tools=tools or None, **given, **options)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise RowError(f"is refused by the chat template ({str(error).strip().splitlines()[0]})") from None

    def _span(self, whole: str, messages: list[Message], turn: int, tools: Any, special: list[str]) -> tuple[int, int]:
        """Where a turn stands in the text of the whole conversation, which has these special tokens."""
        # Without a message before it nothing says where the text of the template ends and the turn begins.
        if turn:
            before = len(self._render(messages[:turn], tools))
            begin = _common(whole, self._render(messages[:turn], tools, ask=True))
            told = self._render(messages[: turn + 1], tools)
            end = _common(whole, told)
            # The last place of each, as a word may stand in the template's own text, or in a token's name, too.
            text = _blanked(told, special)
            spoken = [_blanked(part, special) for part in _spoken(messages[turn])]
            found = [text.rfind(part, begin) + len(part) for part in spoken]
            last = max(found, default=end)
            # What asks for an answer may hold more than the history (an opened thought), never less.
            if before <= begin < last <= end and min(found, default=end) > begin:
                return begin, _whole_token(whole, last, end, special)
        return self._span_of_content(whole, messages, turn, tools, special)

    def _span_of_content(
        self, whole: str, messages: list[Message], turn: int, tools: Any, special: list[str]
    ) -> tuple[int, int]:
        """What the turn says and the token that ends it: for templates that write turns otherwise once more follow."""
        mark = "\u2063influence\u2063"
        marked = {name: value for name, value in messages[turn].items() if name != "tool_calls"} | {"content": mark}
        other = self._render([*messages[:turn], marked, *messages[turn + 1 :]], tools)
        begin = other.find(mark)
        after = other[begin + len(mark) :]
        end = len(whole) - len(after)
        if begin < 0 or other.count(mark) != 1 or whole[:begin] != other[:begin] or whole[end:] != after or end < begin:
            raise RowError(
                f"has a turn {turn} that cannot be found in the text of the chat template; mark what the assistant writes "
                "with {% generation %} in a template of your own (--chat-template FILE)"
            )
        unwritten = [name for name in _called(messages[turn]) if name not in whole[begin:end]]
        if unwritten:
            raise RowError(
                f"has a turn {turn} that calls the tool {unwritten[0]!r}, which the chat template leaves out"
            )
        closing = next((token for token in special if whole.startswith(token, end)), "")
        # A blank before a word is of the same token in most vocabularies.
        return len(whole[:begin].rstrip(" ")), end + len(closing)

    @cached_property
    def _added(self) -> dict[int, str]:
        """Tokens that are never split, by number; runs of blanks, which some vocabularies have among them, mark nothing."""
        return {number: token for token, number in self.tokenizer.get_added_vocab().items() if token.strip()}

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        mask: list[bool] = []
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for number, (begin, end) in enumerate(itertools.pairwise(edges)):
            part = self.tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
            ids, mask = ids + part, mask + [number % 2 == 1] * len(part)
        return ids, mask


def _spoken(message: Message) -> list[str]:
    """What a turn is recognised by: its answer, without a thought, which templates rewrite, and the tools it calls."""
    content = message["content"] or ""
    return [part for part in (content.rpartition("</think>")[2].strip(), *_called(message)) if part]


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """A conversation as it is, then in the other forms that templates want of calls of tools.

    Arguments are an object to some and the text of one to others (DeepSeek, OpenAI); a call without words beside it has an
    empty content to some, and to others none (DeepSeek).
    """
    yield messages
    if not any(map(_called, messages)):
        return
    forms = [[_with_arguments(message, of) for message in messages] for of in (_as_text, _as_object)]
    seen = [messages]
    for form in [*forms, *([_without_content(one) for one in form] for form in (messages, *forms))]:
        if form not in seen:
            seen.append(form)
            yield form


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """The same with the arguments of every call changed."""
    if not _called(message):
        return message

    def changed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if "function" in call:
            return {**call, "function": changed(call["function"])}
        return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call

    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


def _without_content(message: Message) -> Message:
    return {**message, "content": None} if _called(message) and not message["content"] else message


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments)
    except (TypeError, ValueError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _called(message: Message) -> list[str]:
    """Names of the tools that a message calls."""
    calls = message.get("tool_calls")
    given = (
        [call.get("function", call) for call in calls if isinstance(call, Mapping)] if isinstance(calls, list) else []
    )
    return [str(call["name"]) for call in given if isinstance(call, Mapping) and call.get("name")]


def _blanked(text: str, special: Sequence[str]) -> str:
    """The text with every special token blanked, at the same places."""
    for token in special:
        text = text.replace(token, "\0" * len(token))
    return text


def _whole_token(whole: str, last: int, end: int, special: Sequence[str]) -> int:
    """``end``, or an end of the special token that it lies within: that token ends the turn unless another has."""
    for token in special:
        at = whole.find(token, max(0, end - len(token) + 1), end + len(token) - 1)
        if 0 <= at < end:
            return at if any(one in whole[last:at] for one in special) else at + len(token)
    return end


def _common(one: str, other: str) -> int:
    """How many characters both texts begin with."""
    if one.startswith(other):
        return len(other)
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def read_template(path: str | None) -> str | None:
    """Text of a file with a chat template.

    Raises:
        InputError: it cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"chat_template: cannot read {path!r} ({error})") from None
