"""The one place that recognises what rows are by their columns, and names it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence_fast.data.settings import LABEL, TEXT, DataSettings
from influence_fast.data.tasks import SPAN
from influence_fast.errors import InputError

TOKENISED, CHAT, PREFERENCE, ANSWER = "tokenised", "chat", "preference", "prompt and answer"
INSTRUCTION, PLAIN, LABELLED, TAGGED = "instruction", "text", "text and label", "words and tags"

# Which column names are recognised, the first that fits; a name that users give goes first.
_CHAT = ("messages", "conversations", "conversation")
_ANSWERS = ("completion", "answer", "response", "output", "target", "solution", "summary", "highlights", "targets")
_PAIRS = (
    ("prompt", _ANSWERS),
    ("question", _ANSWERS),
    ("query", _ANSWERS),
    ("problem", _ANSWERS),
    ("source", ("target",)),
    ("inputs", ("targets",)),
    ("input", _ANSWERS),
)
_SEQ2SEQ_PAIRS = (
    *_PAIRS,
    ("document", ("summary",)),
    ("article", ("highlights", "summary")),
    ("dialogue", ("summary",)),
    (TEXT, ("summary", "target", "labels", "label")),
)
_TEXTS = (
    (TEXT,),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
    ("sentence",),
    ("content",),
    ("review",),
    ("comment",),
    ("tweet",),
    ("headline",),
    ("document",),
    ("utterance",),
)
_LABELS = ("labels", "class", "category", "target", "sentiment", "intent", "score", "stars", "rating")
_WORDS = ("tokens", "words")
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_TAGS = ("ner_tags", "tags", "labels", "pos_tags", "chunk_tags")


@dataclass(frozen=True)
class Form:
    """What rows are, and which of their columns hold it.

    Attributes:
        name: one of the names above.
        inputs: columns of the text, the conversation, the words or the pair of answers.
        targets: columns of the answer, the label or the tags.
        prompt: of preferences and instructions, the column of what comes before; None without.
    """

    name: str
    inputs: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    prompt: str | None = None

    def __str__(self) -> str:
        columns = [*([self.prompt] if self.prompt else []), *self.inputs]
        said = f"{self.name}: {' and '.join(map(repr, columns))}" if columns else self.name
        return said + (f", targets in {' and '.join(map(repr, self.targets))}" if self.targets else "")


def is_tokenised(row: Mapping[str, Any]) -> bool:
    """Whether a row is one for the model already."""
    return "input_ids" in row and ("labels" in row or all(name in row for name in SPAN))


def recognise(argument: str, columns: Sequence[str], first: Mapping[str, Any], given: DataSettings, task: str) -> Form:
    """What rows with these columns are for a task.

    Raises:
        InputError: a column that was named and is not there; nothing that is recognised (lists the columns and the options).
    """
    if is_tokenised(first):
        return Form(TOKENISED)
    there = _Columns(argument, list(columns), first)
    text = there.named(given.text) if given.text != TEXT or TEXT in there.names else None
    label = there.named(given.label) if given.label != LABEL or LABEL in there.names else None
    if task in ("classification", "multi-label", "regression"):
        # A text and a label of their own are missed by name, so that a mistyped option is seen.
        return Form(LABELLED, text or there.one_of(_TEXTS, "text"), label or there.one_of((LABEL, *_LABELS), "label"))
    if task == "token-classification":
        tags = label if label and given.label != LABEL else there.one_of((*_TAGS, LABEL), "label")
        return Form(TAGGED, text if given.text != TEXT and text else there.one_of(_WORDS, "text"), tags)
    if given.answer is not None:
        return Form(ANSWER, text or there.one_of((*_TEXTS, *(p for p, _ in _PAIRS)), "text"), there.named(given.answer))
    return _generative(there, text if given.text != TEXT else None, task)


def _generative(there: _Columns, text: tuple[str, ...] | None, task: str) -> Form:
    if task == "seq2seq":
        if isinstance(there.first.get("translation"), Mapping) and text is None:
            return Form(ANSWER, ("translation",), ("translation",))
        pair = there.pair(_SEQ2SEQ_PAIRS, text)
        if pair is None:
            raise there.missing("an input and an output", "--text-column and --answer-column")
        return Form(ANSWER, *pair)
    if text is not None:
        conversation = len(text) == 1 and _is_conversation(there.first.get(text[0]))
        return Form(CHAT if conversation else PLAIN, text)
    if "chosen" in there.names and "rejected" in there.names:
        return Form(PREFERENCE, ("chosen", "rejected"), prompt="prompt" if "prompt" in there.names else None)
    for name in _CHAT:
        if name in there.names and _is_conversation(there.first.get(name)):
            return Form(CHAT, (name,))
    if TEXT in there.names:
        return Form(PLAIN, (TEXT,))
    if "instruction" in there.names:
        extra = next((name for name in ("input", "context") if name in there.names), None)
        answer = next((name for name in _ANSWERS if name in there.names), None)
        if answer is not None:
            return Form(INSTRUCTION, (extra,) if extra else (), (answer,), "instruction")
    pair = there.pair(_PAIRS, None)
    if pair is not None:
        return Form(ANSWER, *pair)
    return Form(PLAIN, there.one_of(_TEXTS, "text"))


def _is_conversation(value: Any) -> bool:
    # In a cell of a table it is the text of a JSON list.
    return value is None or (value.lstrip().startswith("[") if isinstance(value, str) else isinstance(value, Sequence))


@dataclass(frozen=True)
class _Columns:
    """The columns that are there, and how to say that one is not."""

    argument: str
    names: list[str]
    first: Mapping[str, Any]

    def named(self, text: str) -> tuple[str, ...]:
        """Columns that the user named, joined by commas; a name that holds a comma itself goes first."""
        chosen = (text,) if text in self.names else tuple(part.strip() for part in text.split(","))
        for name in chosen:
            if name not in self.names:
                raise InputError(f"{self.argument}: has no column {name!r}; there are {', '.join(self.names)}")
        return chosen

    def one_of(self, choices: Sequence[str | tuple[str, ...]], what: str) -> tuple[str, ...]:
        folded = [name.strip().casefold() for name in self.names]
        alike = {key: name for key, name in zip(folded, self.names, strict=True) if folded.count(key) == 1}
        # As the file writes them, or else with capitals or blanks around them.
        for names in ({name: name for name in self.names}, alike):
            for choice in choices:
                wanted = (choice,) if isinstance(choice, str) else choice
                if all(name in names for name in wanted):
                    return tuple(names[name] for name in wanted)
        # A number or nothing is rarely a column's name, and nearly always a row's value.
        header = (
            ""
            if all(key and not _NUMBER.fullmatch(key) for key in folded)
            else "; the first line of a table names them"
        )
        raise InputError(
            f"{self.argument}: has no column {what!r}; there are {', '.join(self.names)} (--{what}-column says which it is"
            f"{header})"
        )

    def pair(
        self, choices: Sequence[tuple[str, tuple[str, ...]]], text: tuple[str, ...] | None
    ) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        for prompt, answers in choices:
            if text is not None or prompt in self.names:
                taken = text or (prompt,)
                for answer in answers:
                    if answer in self.names and answer not in taken:
                        return taken, (answer,)
        return None

    def missing(self, what: str, options: str) -> InputError:
        return InputError(
            f"{self.argument}: has no columns that are known to hold {what}; there are {', '.join(self.names)} "
            f"({options} say which they are)"
        )
