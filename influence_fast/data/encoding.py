"""Texts to token ids as training made them: with the special tokens where they belong, cut where the tokenizer would cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from influence_fast.data.chat import RowError
from influence_fast.data.tasks import IGNORED

# Above this a tokenizer's model_max_length says that it knows none.
_NO_LIMIT = 1 << 24


def longest_input(tokenizer: Any, of_model: int | None) -> int | None:
    """Tokens that a row may have: what the model takes, or the tokenizer where that is less; None without a limit."""
    of_tokenizer = getattr(tokenizer, "model_max_length", None)
    limits = [limit for limit in (of_model, of_tokenizer) if isinstance(limit, int) and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


@dataclass
class TextEncoder:
    """A tokenizer with what it puts around texts.

    Args:
        cut: keep this many tokens at most, as the tokenizer's own truncation does; None keeps all. ``truncated`` counts the
            rows that it shortened.
    """

    tokenizer: Any
    cut: int | None = None
    before: list[int] = field(init=False, default_factory=list)
    after: list[int] = field(init=False, default_factory=list)
    truncated: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        whole, bare = (self._ids("a", add_special_tokens=special) for special in (True, False))
        found = next((at for at in range(len(whole)) if whole[at : at + len(bare)] == bare), None) if bare else None
        if found is not None:
            self.before, self.after = whole[:found], whole[found + len(bare) :]

    def _ids(self, text: str | list[str], **options: Any) -> Any:
        return self.tokenizer(text, verbose=False, **options)["input_ids"]

    @property
    def _cutting(self) -> dict[str, Any]:
        return {} if self.cut is None else {"truncation": True, "max_length": self.cut}

    def classified(self, texts: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
        """``input_ids``, and ``token_type_ids`` where the tokenizer has them, of texts, pairs, or more texts a row."""
        parts = [self._as_pair(text) for text in texts]
        found = self.tokenizer(*map(list, zip(*parts, strict=True)), verbose=False, **self._cutting)
        self._count(found["input_ids"], parts)
        keys = [key for key in ("input_ids", "token_type_ids") if key in found]
        return [{key: found[key][i] for key in keys} for i in range(len(texts))]

    def _as_pair(self, text: tuple[str, ...]) -> tuple[str, ...]:
        """A tokenizer takes two texts; what follows is joined to the second by its separator."""
        if len(text) < 3:
            return text
        separator = getattr(self.tokenizer, "sep_token", None)
        return text[0], (f" {separator} " if separator else "\n").join(text[1:])

    def plain(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that are targets as a whole."""
        found = self._ids(texts, **self._cutting)
        self._count(found, [(text,) for text in texts])
        return found

    def _count(self, found: Sequence[Sequence[int]], texts: Sequence[tuple[str, ...]]) -> None:
        """Of the rows that are as long as may be, which were longer."""
        full = [text for ids, text in zip(found, texts, strict=True) if len(ids) == self.cut]
        if full:
            whole = self.tokenizer(*map(list, zip(*full, strict=True)), verbose=False)["input_ids"]
            self.truncated += sum(len(ids) > (self.cut or 0) for ids in whole)

    def answered(self, prompts: list[str], answers: list[str]) -> list[dict[str, Any]]:
        """Prompt and answer in one sequence, the answer and one end-of-text token as targets.

        What the tokenizer puts behind a text (an end-of-text token) comes behind the answer alone, never between the two.
        """
        heads = self._ids(prompts, add_special_tokens=False)
        tails = self._ids(answers, add_special_tokens=False)
        return [self.joined(head, tail) for head, tail in zip(heads, tails, strict=True)]

    def joined(self, head: list[int], tail: list[int]) -> dict[str, Any]:
        """Tokens of a prompt and of its answer as one row."""
        end = self.tokenizer.eos_token_id
        closing = [] if end is None or (tail and tail[-1] == end) else [end]
        begin = [*self.before, *head]
        ids = [*begin, *tail, *closing]
        return self.shortened({"input_ids": ids, "labels": [*[IGNORED] * len(begin), *ids[len(begin) :]]})

    def shortened(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of a language model without what is behind the cut."""
        if self.cut is None or len(row["input_ids"]) <= self.cut:
            return row
        self.truncated += 1
        return {name: values[: self.cut] for name, values in row.items()}

    def translated(self, inputs: list[str], outputs: list[str]) -> list[dict[str, Any]]:
        """Inputs of an encoder and targets of its decoder."""
        found = self.tokenizer(inputs, verbose=False, **self._cutting)["input_ids"]
        self._count(found, [(text,) for text in inputs])
        targets = self.tokenizer(text_target=outputs, verbose=False, **self._cutting)["input_ids"]
        return [{"input_ids": ids, "labels": labels} for ids, labels in zip(found, targets, strict=True)]

    def tagged(self, words: list[str], tags: list[int]) -> dict[str, Any]:
        """Words with a tag each: the first token of a word has it, its other tokens and special ones are no targets.

        Raises:
            RowError: a tokenizer that does not say which token is of which word.
        """
        found = self.tokenizer(words, is_split_into_words=True, verbose=False, **self._cutting)
        if not getattr(self.tokenizer, "is_fast", False):
            return self._tagged_slowly(words, tags)
        labels, last = [], None
        for word in found.word_ids():
            labels.append(tags[word] if word is not None and word != last else IGNORED)
            last = word
        if all(label == IGNORED for label in labels):
            raise RowError("has no word that a token stands for")
        kept = {key: found[key] for key in ("input_ids", "token_type_ids") if key in found}
        return {**kept, "labels": labels}

    def _tagged_slowly(self, words: list[str], tags: list[int]) -> dict[str, Any]:
        parts = [self._ids(word, add_special_tokens=False) for word in words]
        space = None if self.cut is None else self.cut - len(self.before) - len(self.after)
        ids = [token for part in parts for token in part][:space]
        labels = [
            tag if not place else IGNORED for part, tag in zip(parts, tags, strict=True) for place, _ in enumerate(part)
        ][:space]
        around = ([IGNORED] * len(side) for side in (self.before, self.after))
        return {"input_ids": [*self.before, *ids, *self.after], "labels": [*next(around), *labels, *next(around)]}
