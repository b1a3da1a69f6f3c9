"""Rows become samples: recognised, texts made tokens, labels targets; a row that cannot be is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.data import forms
from influence_fast.data.chat import (
    ASSISTANT,
    ChatEncoder,
    RowError,
    messages_of,
    read_template,
    tools_of,
    turns,
    turns_of,
)
from influence_fast.data.encoding import TextEncoder, longest_input
from influence_fast.data.forms import Form, is_tokenised, recognise
from influence_fast.data.labels import Classes, classes_of, flag_of, is_hot, is_missing, numbers_of, several_classes
from influence_fast.data.loading import Problem, Table, read_table, refuse
from influence_fast.data.packing import check_boundaries, pack
from influence_fast.data.settings import OPTIONS, TASKS, DataSettings
from influence_fast.data.tasks import CLASS_LOSSES, IGNORED, head_of, longest_row, loss_of, unwrapped
from influence_fast.errors import InputError

# Texts that Alpaca's data come with (Taori et al. 2023), with an input and without.
_ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n",
)

_WITH_CLASSES = (*CLASS_LOSSES, "multi-label", "token-classification")


@dataclass
class Samples:
    """Rows for the model, and what a report prints of them.

    Attributes:
        rows: dicts of the model's inputs and targets.
        texts, labels: of each sample, for people; a label is a class's name where anybody knows it.
        noise: boolean ``(n,)``, which are known to be bad.
        ids: names of the samples; None where they are the numbers of the rows.
        form: what the rows were recognised as, in words.
        skipped: rows that were left out.
        where: each sample's place in its file.
        task: what they are samples of.
        truncated: how many were cut.
        class_names: names of the classes by number, where anybody knows them.
        unused: settings that were given and that no row had a use for.
    """

    rows: list[dict[str, Any]]
    texts: list[str] | None
    labels: list[Any] | None
    noise: Tensor | None
    ids: list[int | str] | None
    form: str = ""
    skipped: list[Problem] = field(default_factory=list)
    where: list[str] | None = None
    task: str = ""
    truncated: int = 0
    class_names: list[str] | None = None
    unused: list[str] = field(default_factory=list)

    def refuse_unused(self, argument: str) -> None:
        """Raise InputError for a setting that was given and had no use: its user expects something that did not happen."""
        if self.unused:
            raise InputError(
                f"{self.unused[0]}: nothing in {argument} uses it for {self.task} of rows read as {self.form}; leave it out"
            )

    def shown(self, number: int) -> str | int:
        """A class's name, or its number."""
        names = self.class_names
        return names[number] if names and 0 <= number < len(names) else number

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, chosen: Sequence[int]) -> Samples:
        """These samples alone, under their own names."""
        ids: list[int | str] = list(range(len(self.rows))) if self.ids is None else self.ids
        pick: Callable[[Any], Any] = lambda values: None if values is None else [values[i] for i in chosen]  # noqa: E731
        noise = None if self.noise is None else self.noise[torch.tensor(list(chosen), dtype=torch.long)]
        return replace(
            self,
            rows=pick(self.rows),
            texts=pick(self.texts),
            labels=pick(self.labels),
            noise=noise,
            ids=pick(ids),
            where=pick(self.where),
        )


def task_of(task: str, model: nn.Module, rows: Any, label: str = DataSettings.label) -> str:
    """``auto`` made definite, by the labels of rows that are tokenised already, or by the model's head and config."""
    if task != "auto":
        return task
    first = rows[0]
    if is_tokenised(first):
        return loss_of(model, first)
    head = head_of(model) or "classification"
    if head == "classification":
        value = first.get(label)
        # Names and numbers of classes are no numbers for a loss to tell its kind by.
        listed = isinstance(value, list | tuple) or "," in label
        return loss_of(model, {"labels": [1.0] if listed else 0})
    if head == "causal-lm" and "chosen" in first and "rejected" in first:
        return "preference"
    if head not in TASKS:
        raise InputError(
            f"task: rows of texts can be made samples of {', '.join(TASKS[1:])}, and this is a "
            f"{type(unwrapped(model)).__name__}; give rows with 'input_ids' and what {head} needs"
        )
    return head


def prepare(argument: str, rows: Any, given: DataSettings, task: str, model: nn.Module, tokenizer: Any) -> Samples:
    """Samples of rows; those that hold ``input_ids`` and ``labels`` pass as they are. Errors name ``argument``.

    Raises:
        InputError: rows that no sample can be made of, unless they are to be skipped; columns that are not there.
    """
    table = rows if isinstance(rows, Table) else read_table(argument, rows)
    form = recognise(argument, table.columns, table.rows[0], given, task)
    if form.name != forms.TOKENISED and tokenizer is None:
        raise InputError(f"tokenizer: none is given, and {argument} has no 'input_ids' and 'labels' columns")
    maker = _Maker(argument, table, given, task, model, tokenizer, form)
    made = maker.packed() if form.name == forms.PLAIN and given.block_size is not None else maker.made()
    return replace(made, skipped=[*table.skipped, *made.skipped], task=task, unused=maker.unused())


@dataclass
class _Maker:
    """Rows of one form, made samples."""

    argument: str
    table: Table
    given: DataSettings
    task: str
    model: nn.Module
    tokenizer: Any
    form: Form
    problems: list[Problem] = field(default_factory=list)
    templated: bool = False
    """Whether some row went through the chat template."""

    def __post_init__(self) -> None:
        longest = longest_row(self.model)
        self.longest = longest
        self.text = (
            TextEncoder(self.tokenizer, longest_input(self.tokenizer, longest) if self.given.truncate else None)
            if self.form.name != forms.TOKENISED
            else None
        )

    def made(self) -> Samples:
        kept, pieces = self._each(range(len(self.table)), self._reader())
        rows = self._encoded(pieces)
        kept, checked = self._each(kept, lambda number, row: self._checked(row), rows)
        self._finish()
        chosen = set(kept)
        texts = [self._shown(number) for number in kept]
        labels = self._labels_shown([row.get("labels") for row in checked])
        return Samples(
            checked,
            texts if any(texts) else None,
            labels,
            self._noise(kept),
            self._ids(kept, len(chosen) < len(self.table)),
            str(self.form),
            self.problems,
            [self.table.where(number) for number in kept] if self.table.lines else None,
            truncated=self.text.truncated if self.text else 0,
            class_names=self._classes.names if self.task in _WITH_CLASSES else None,
        )

    def packed(self) -> Samples:
        """Blocks of plain texts; the number of a block is its name, and it says which rows are in it."""
        assert self.text is not None
        assert self.given.block_size is not None
        size = self.given.block_size
        if self.longest is not None and size > self.longest:
            raise InputError(f"block_size: the model takes {self.longest} tokens, got {size}")
        kept, pieces = self._each(range(len(self.table)), self._reader())
        self._finish()
        end = self.tokenizer.eos_token_id
        texts = self.text._ids([piece[0] for piece in pieces])
        texts = [ids if end is None or (ids and ids[-1] == end) else [*ids, end] for ids in texts]
        blocks, members = pack(texts, size)
        full = [place for place, block in enumerate(blocks) if any(label != IGNORED for label in block["labels"])]
        blocks, members = [blocks[place] for place in full], [members[place] for place in full]
        check_boundaries(self.model, blocks)
        shown = [" | ".join(pieces[number][0] for number in numbers) for numbers in members]
        where = [", ".join(self.table.where(kept[number]) for number in numbers) for numbers in members]
        form = f"{self.form}, {len(pieces)} texts packed into {len(blocks)} blocks of {size} tokens"
        return Samples(blocks, shown, None, None, None, form, self.problems, where)

    def unused(self) -> list[str]:
        """Settings that were given and that these rows have no use for."""
        given, name, default = self.given, self.form.name, DataSettings()
        used = {
            "chat_template": self.templated,
            "as_chat": self.templated,
            "block_size": name == forms.PLAIN,
            "label_names": self.task in _WITH_CLASSES,
            "label": name in (forms.LABELLED, forms.TAGGED, forms.TOKENISED),
            "answer": name == forms.ANSWER,
        }
        names = {setting: option for option, setting in OPTIONS.items()}
        return [names[one] for one, use in used.items() if not use and getattr(given, one) != getattr(default, one)]

    def _each(
        self, numbers: Sequence[int], make: Callable[[int, Any], Any], values: Sequence[Any] | None = None
    ) -> tuple[list[int], list[Any]]:
        """What ``make`` gives for rows, with their numbers; a row that it raises RowError of is a problem."""
        kept, out = [], []
        for place, number in enumerate(numbers):
            try:
                out.append(make(number, self.table.rows[number] if values is None else values[place]))
            except RowError as error:
                self.problems.append(Problem(self.table.where(number), str(error), error.empty))
            else:
                kept.append(number)
        return kept, out

    def _finish(self) -> None:
        if not self.given.skip_bad:
            refuse(self.argument, self.problems, len(self.table))
        if len(self.problems) == len(self.table):
            refuse(self.argument, self.problems, len(self.table))

    # From a row to pieces of text, labels among them.

    def _reader(self) -> Callable[[int, dict[str, Any]], Any]:
        form, name = self.form, self.form.name
        if name == forms.TOKENISED:
            return lambda number, row: dict(row)
        if name == forms.LABELLED:
            label = self._label_reader()
            return lambda number, row: (self._texts(row, form.inputs), label(row))
        if name == forms.TAGGED:
            return self._tagged_reader()
        if name == forms.CHAT:
            return lambda number, row: (messages_of(row.get(form.inputs[0])), tools_of(row), 0)
        if name == forms.PREFERENCE:
            return lambda number, row: self._preference(row)
        if name == forms.PLAIN:
            return lambda number, row: ("\n".join(self._texts(row, form.inputs)),)
        return lambda number, row: self._prompt_and_answer(row)

    def _text(self, row: dict[str, Any], column: str, empty: bool = False) -> str:
        """A cell as text; a number as it is written."""
        value = row.get(column)
        if isinstance(value, str):
            if not empty and not value.strip():
                raise RowError(f"has an empty text in {column!r}", empty=True)
            return value
        if is_missing(value):
            raise RowError(f"has no text in {column!r}", empty=True)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise RowError(f"has a {type(value).__name__} in {column!r}, expected text")

    def _texts(self, row: dict[str, Any], columns: Sequence[str]) -> tuple[str, ...]:
        return tuple(self._text(row, column) for column in columns)

    @property
    def _classes(self) -> Classes:
        if self.form.targets:
            of_data = self.table.class_names.get(self.form.targets[0])
        else:
            of_data = self.table.class_names.get("labels")
        return classes_of(self.argument, self.model, self.given.label_names, of_data)

    def _label_reader(self) -> Callable[[dict[str, Any]], Any]:
        columns, classes, joined = self.form.targets, self._classes, ", ".join(self.form.targets)

        def value(row: dict[str, Any]) -> Any:
            found = [_listed(row.get(column)) for column in columns]
            return found[0] if len(columns) == 1 else found

        if self.task == "classification":
            return lambda row: classes.number(joined, value(row))
        if self.task == "regression":
            return lambda row: numbers_of(joined, value(row), classes.count)
        hot = len(columns) > 1 or is_hot([value(row) for row in self.table.rows], classes.count)
        if len(columns) > 1:
            return lambda row: numbers_of(joined, value(row), classes.count)
        return lambda row: several_classes(joined, value(row), classes, hot)

    def _tagged_reader(self) -> Callable[[int, dict[str, Any]], Any]:
        words_in, tags_in, classes = self.form.inputs[0], (self.form.targets or ("",))[0], self._classes

        def read(number: int, row: dict[str, Any]) -> tuple[list[str], list[int]]:
            words, tags = (
                value.split() if isinstance(value, str) else _listed(value)
                for value in (row.get(words_in), row.get(tags_in))
            )
            if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                raise RowError(f"has no list of words in {words_in!r}")
            if not isinstance(tags, list) or len(tags) != len(words):
                count = len(tags) if isinstance(tags, list) else "no"
                raise RowError(f"has {len(words)} words in {words_in!r} and {count} tags in {tags_in!r}")
            return words, [IGNORED if tag == IGNORED else classes.number(tags_in, tag) for tag in tags]

        return read

    def _prompt_and_answer(self, row: dict[str, Any]) -> Any:
        """``(prompt, answer)`` as texts, or ``(messages, tools)`` where they are turns of a conversation."""
        form = self.form
        if form.name == forms.INSTRUCTION:
            assert form.prompt is not None
            instruction, answer = self._text(row, form.prompt), self._text(row, form.targets[0])
            given = row.get(form.inputs[0]) if form.inputs else None
            extra = None if is_missing(given) else str(given)
            if self.given.as_chat:
                return turns(instruction if extra is None else f"{instruction}\n\n{extra}", answer), None, 1
            return _ALPACA[extra is None].format(instruction=instruction, input=extra), answer
        if form.inputs == ("translation",):
            pair = list((row.get("translation") or {}).values())
            if len(pair) != 2 or not all(isinstance(text, str) and text for text in pair):
                raise RowError("has no two texts in 'translation'")
            return pair[0], pair[1]
        (column,) = form.targets
        both = [row.get(name) for name in (form.inputs[0], column)]
        if any(isinstance(value, list) for value in both):
            asked, told = turns_of(both[0], "user"), turns_of(both[1], ASSISTANT)
            return [*asked, *told], tools_of(row), len(asked)
        text = "\n".join(self._texts(row, form.inputs))
        # An answer may be empty, the end alone; it may not be missing.
        answer = self._text(row, column, empty=True)
        return (turns(text, answer), None, 1) if self.given.as_chat else (text, answer)

    def _preference(self, row: dict[str, Any]) -> Any:
        """Both answers as ``(prompt, answer)`` or as conversations."""
        prompt = row.get(self.form.prompt) if self.form.prompt else None
        both = [row.get(name) for name in self.form.inputs]
        if any(isinstance(value, list) for value in (prompt, *both)):
            before = turns_of(prompt, "user") if prompt else []
            talks = [[*before, *turns_of(value, ASSISTANT)] for value in both]
            # Without a prompt it is the messages that both begin with.
            begin = next((i for i, (a, b) in enumerate(zip(*talks, strict=False)) if a != b), min(map(len, talks)))
            return [(talk, tools_of(row), begin) for talk in talks]
        text = self._text(row, self.form.prompt) if self.form.prompt else ""
        answers = self._texts(row, self.form.inputs)
        if answers[0] == answers[1]:
            raise RowError("has the same text in 'chosen' and 'rejected'")
        if self.given.as_chat:
            return [(turns(text, answer), None, 1) for answer in answers]
        if not text:
            shared = _common(*answers)
            return [(answer[:shared], answer[shared:]) for answer in answers]
        return [(text, answer) for answer in answers]

    # From pieces to rows for the model, as many at once as the tokenizer takes.

    def _encoded(self, pieces: list[Any]) -> list[Any]:
        """A row for each piece; what cannot be encoded is a RowError in its place."""
        name, text = self.form.name, self.text
        if name == forms.TOKENISED or not pieces:
            return pieces
        assert text is not None
        if name == forms.LABELLED:
            rows = text.classified([texts for texts, _ in pieces])
            return [{**row, "labels": label} for row, (_, label) in zip(rows, pieces, strict=True)]
        if name == forms.TAGGED:
            return [_attempt(text.tagged, *piece) for piece in pieces]
        if name == forms.PLAIN:
            return [{"input_ids": ids, "labels": list(ids)} for ids in text.plain([piece[0] for piece in pieces])]
        chat = any(
            isinstance(part[0], list) for piece in pieces for part in (piece if name == forms.PREFERENCE else [piece])
        )
        if self.task == "seq2seq":
            if chat:
                raise InputError(f"{self.argument}: an encoder-decoder takes texts, and some rows hold conversations")
            return text.translated([one for one, _ in pieces], [other for _, other in pieces])
        self.templated = chat
        encode = self._chat() if chat else None

        def encoded(piece: Any) -> Any:
            if isinstance(piece[0], list):
                assert encode is not None
                ids, target = encode(*piece)
                labels = [token if told else IGNORED for token, told in zip(ids, target, strict=True)]
                return text.shortened({"input_ids": list(ids), "labels": labels})
            return text.answered([piece[0]], [piece[1]])[0]

        if name == forms.PREFERENCE:
            return [_attempt(self._pair, [_attempt(encoded, part) for part in piece]) for piece in pieces]
        if chat:
            return [_attempt(encoded, piece) for piece in pieces]
        return text.answered([prompt for prompt, _ in pieces], [answer for _, answer in pieces])

    def _chat(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, read_template(self.given.chat_template))

    @staticmethod
    def _pair(both: list[Any]) -> dict[str, Any]:
        for which, row in zip(("chosen", "rejected"), both, strict=True):
            if isinstance(row, RowError):
                raise row
            if all(label == IGNORED for label in row["labels"][1:]):
                raise RowError(f"has no target token in {which!r}")
        return {name: [row[name] for row in both] for name in ("input_ids", "labels")}

    def _checked(self, row: Any) -> Any:
        """A row that the model can take, or a RowError."""
        if isinstance(row, RowError):
            raise row
        if self.form.name == forms.TOKENISED:
            return row
        nested = row["input_ids"] if self.form.name == forms.PREFERENCE else [row["input_ids"]]
        for ids in nested:
            if not ids:
                raise RowError("has no tokens")
            if self.longest is not None and len(ids) > self.longest:
                raise RowError(
                    f"has {len(ids)} tokens, the model takes {self.longest}; truncate=True (--truncate) cuts such rows"
                )
        labels = row["labels"]
        if self.task in ("causal-lm", "causal-lm-sum") and all(label == IGNORED for label in labels[1:]):
            raise RowError(
                "has no target token" + (": its prompt fills the model's context" if self.given.truncate else "")
            )
        return row

    # What people are shown.

    def _shown(self, number: int) -> str:
        row, form = self.table.rows[number], self.form
        if form.name == forms.TOKENISED:
            return str(row["text"]) if "text" in row else ""
        if form.name == forms.LABELLED:
            return " | ".join(str(row.get(column)) for column in form.inputs)
        if form.name == forms.TAGGED:
            words = row.get(form.inputs[0])
            return words if isinstance(words, str) else " ".join(map(str, _listed(words)))
        parts = [row.get(name) for name in dict.fromkeys([form.prompt or "", *form.inputs, *form.targets]) if name]
        return (
            "".join(_as_text(part) for part in parts)
            if form.name == forms.ANSWER
            else " | ".join(_as_text(part) for part in parts if not is_missing(part))
        )

    def _labels_shown(self, labels: list[Any]) -> list[Any] | None:
        if self.task in CLASS_LOSSES:
            classes = self._classes
            return [classes.shown(label) if isinstance(label, int) else label for label in labels]
        if self.task == "multi-label":
            classes = self._classes
            return [", ".join(str(classes.shown(i)) for i, on in enumerate(label) if on) for label in labels]
        return labels if self.task == "regression" else None

    def _noise(self, kept: list[int]) -> Tensor | None:
        column = self.given.noise
        if column is None:
            return None
        if column not in self.table.columns:
            raise InputError(f"{self.argument}: has no column {column!r}; there are {', '.join(self.table.columns)}")
        values = [flag_of(self.table.rows[number].get(column)) for number in kept]
        bad = [place for place, value in enumerate(values) if value is None]
        if bad:
            raise InputError(
                f"{self.argument}: {self.table.where(kept[bad[0]])} has {column} "
                f"{self.table.rows[kept[bad[0]]].get(column)!r}, expected true or false"
            )
        flags = torch.tensor(values, dtype=torch.bool)
        if flags.all() or not flags.any():
            raise InputError(
                f"{self.argument}: {column!r} marks {int(flags.sum())} of {len(flags)} samples; nothing to tell apart"
            )
        return flags

    def _ids(self, kept: list[int], fewer: bool) -> list[int | str] | None:
        if "id" not in self.table.columns:
            return list(kept) if fewer else None
        out: list[int | str] = []
        for number in kept:
            value = self.table.rows[number].get("id")
            if is_missing(value) or isinstance(value, bool) or not isinstance(value, int | str | float):
                raise InputError(
                    f"{self.argument}: {self.table.where(number)} has id {value!r}, expected a number or a text"
                )
            out.append(str(value) if isinstance(value, float) else value)
        return out


def _attempt(make: Callable[..., Any], *given: Any) -> Any:
    try:
        return make(*given)
    except RowError as error:
        return error


def _common(one: str, other: str) -> int:
    """Characters that both texts begin with, up to the last line end or the last space among them."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return max(one.rfind("\n", 0, same), one.rfind(" ", 0, same)) + 1


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(
            f"{message.get('role', message.get('from'))}: {message.get('content', message.get('value'))}"
            if isinstance(message, dict)
            else str(message)
            for message in value
        )
    return " | ".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def _listed(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
