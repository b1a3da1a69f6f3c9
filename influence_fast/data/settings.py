"""What a user says about data: which columns hold what, and how rows are read and become samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from influence_fast.errors import InputError

TASKS = (
    "auto",
    "classification",
    "causal-lm",
    "seq2seq",
    "token-classification",
    "multi-label",
    "regression",
    "preference",
)
"""What models do that rows of texts can be made samples of."""


@dataclass(frozen=True)
class DataSettings:
    """How rows are read and become samples.

    Attributes:
        text: column of the text, or several joined by commas. Where there is none of the default's name, the columns are
            recognised by theirs.
        label: column of the label, or several joined by commas; as ``text``.
        answer: column of the text that a language model is to predict.
        noise: column that is true for rows known to be bad.
        label_names: names of the classes, in the order of their numbers; those of the model's config by default.
        chat_template: file of a Jinja template for conversations; the tokenizer's own by default.
        as_chat: put prompts and answers, or instructions and outputs, into the chat template too.
        block_size: pack plain texts into blocks of this many tokens; None: each text is a sample.
        split: which split to read of a source that has several.
        limit: read no more rows than this.
        skip_bad: leave out rows that no sample can be made of, and list them.
        truncate: cut what is longer than the model takes, as the tokenizer does.

    Raises:
        InputError: a value that cannot be meant.
    """

    text: str = "text"
    label: str = "label"
    answer: str | None = None
    noise: str | None = None
    label_names: Sequence[str] | None = None
    chat_template: str | None = None
    as_chat: bool = False
    block_size: int | None = None
    split: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    truncate: bool = False

    def __post_init__(self) -> None:
        for name in ("block_size", "limit"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name}: expected a positive int, got {value!r}")
        if self.label_names is not None and len(set(self.label_names)) != len(self.label_names):
            raise InputError(f"label_names: expected different names, got {', '.join(self.label_names)}")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DataSettings:
        """From the names that the command line and ``inf.audit`` give to these settings; others are left alone."""
        return cls(**{name: options[option] for option, name in OPTIONS.items() if option in options})

    def options(self) -> dict[str, Any]:
        """The settings under those names; one that is as by default only where it always was written."""
        values = {option: getattr(self, name) for option, name in OPTIONS.items()}
        default = DataSettings()
        always = ("text_column", "label_column", "noise_column", "answer_column")
        return {
            option: list(value) if isinstance(value, tuple) else value
            for option, value in values.items()
            if option in always or value != getattr(default, OPTIONS[option])
        }


OPTIONS = {
    "text_column": "text",
    "label_column": "label",
    "noise_column": "noise",
    "answer_column": "answer",
    **{one.name: one.name for one in fields(DataSettings) if one.name not in ("text", "label", "noise", "answer")},
}
"""Names of the settings for users, and here."""
TEXT, LABEL = DataSettings.text, DataSettings.label
"""Names of columns that stand for any that are recognised, where no column is called so."""
