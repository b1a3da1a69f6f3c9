"""One query's most helpful and most harmful training rows, with what a person wants to see of each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from influence_fast.attribution.token_influence import token_influence, token_layer
from influence_fast.data.loading import Table, read_table
from influence_fast.data.models import load_model
from influence_fast.data.remembered import Remembered, remembered, shown_rows
from influence_fast.data.samples import Samples, prepare, task_of
from influence_fast.data.settings import DataSettings
from influence_fast.errors import InfluenceError, InputError, StoreError
from influence_fast.gradients.build import verified_settings
from influence_fast.gradients.differences import other_space
from influence_fast.gradients.identity import identity_of
from influence_fast.gradients.job import prepare_job
from influence_fast.gradients.layers import layer_groups
from influence_fast.gradients.model_state import as_evaluated, fingerprint
from influence_fast.gradients.settings import BuildSettings
from influence_fast.gradients.store import GradientStore
from influence_fast.ops.projections import Projection
from influence_fast.search.index_files import read_document
from influence_fast.search.influence_index import METHODS, METRICS, InfluenceIndex

TASKS = ("classification", "causal-lm")
MOST_ROWS, LONGEST = 50, 20_000
"""Rows of an answer, and characters of a text, at most."""


class BusyError(InfluenceError):
    """The model was in use for as long as the question could wait."""


@dataclass(frozen=True)
class Question:
    """What is asked for: a text with its label or answer, or a held-out query or a training row by name.

    Raises:
        InputError: not one of these, or a text that is too long.
    """

    text: str | None = None
    label: str | None = None
    answer: str | None = None
    query: str | None = None
    row: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("text", "query", "row") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InputError(f"question: expected one of text, query and row, got {', '.join(given) or 'none'}")
        if self.text is None and (self.label is not None or self.answer is not None):
            raise InputError("question: label and answer belong to a text")
        for name in ("text", "label", "answer"):
            value = getattr(self, name)
            if value is not None and len(value) > LONGEST:
                raise InputError(f"{name}: expected at most {LONGEST} characters, got {len(value)}")


@dataclass(frozen=True)
class _Asked:
    """A question's gradients, and the row that they are of where the model is to see its tokens."""

    gradients: dict[str, Tensor]
    row: Mapping[str, Any] | None
    text: str
    label: str


def open_index(path: Path) -> tuple[InfluenceIndex, Path | None]:
    """An index, and the folder of the one store that it is of; a store is indexed in memory."""
    if (path / "manifest.json").exists():
        return InfluenceIndex.build(GradientStore.open(path), "Flat"), path
    loaded = InfluenceIndex.load(path)
    stores = read_document(path)["stores"]
    return loaded, Path(os.path.normpath(path.resolve() / stores[0]["path"])) if len(stores) == 1 else None


class Lookup:
    """Answers questions with an index, its model and its data; made by :meth:`open`, asked by any number of threads.

    Attributes:
        index: what is searched.
        task: ``classification`` or ``causal-lm``.
        classes: names of the classes, where the model is a classifier.
        queries: held-out queries, or None.
        note: why rows have no texts, where they have none.
    """

    def __init__(
        self,
        index: InfluenceIndex,
        model: nn.Module,
        tokenizer: Any,
        task: str,
        settings: DataSettings,
        table: Table | None,
        shown: Mapping[str, tuple[str, str]],
        queries: Samples | None,
        note: str = "",
    ) -> None:
        if task not in TASKS:
            raise InputError(f"model: questions are asked of {' and '.join(TASKS)}, this one is for {task}")
        self.index, self.task, self.queries, self.note = index, task, queries, note
        self._model, self._tokenizer, self._settings, self._shown = model, tokenizer, settings, shown
        self._table = table
        names = range(len(table)) if table is not None else ()
        # The same names that a store gives its rows.
        self._place = {str(table.rows[i].get("id", i)): i for i in names} if table is not None else {}
        ids = index.ids
        self._row_of = None if isinstance(ids, range) else {str(name): row for row, name in enumerate(ids)}
        self._groups = {name: members for name, members in layer_groups(model, index.layers).items() if name != "all"}
        self._verified: dict[tuple[str, ...], BuildSettings] = {}
        self._layer: dict[str, str | None] = {}
        self._lock = Lock()
        config = getattr(model, "config", None)
        by_number = getattr(config, "id2label", None) or {}
        self.classes = [str(name) for _, name in sorted(by_number.items())] if task == "classification" else []

    @classmethod
    def open(
        cls, path: Path, model: str, data: Sequence[str] = (), queries: str | None = None, device: Any = None
    ) -> Lookup:
        """Load an index or a store, its model, and the training rows, by default from where the store knows them.

        Raises:
            InputError: data that cannot be read or are others, a model for another task. StoreError: another model.
        """
        index, store = open_index(path)
        network, tokenizer = load_model(model, "auto")
        if fingerprint(network) != index.meta["model"]:
            raise StoreError(f"model: {model} is another than the index was made with")
        if other := other_space(index.identity, identity_of(network, None, tokenizer)):
            raise StoreError(f"model: {model} computes something else than the index was made with ({other})")
        known = None if store is None else remembered(store)
        settings = DataSettings() if known is None else known.settings
        table, shown, note = _training_rows(list(data), known, settings)
        asked, task = None, known.task if known else None
        fresh = replace(settings, noise=None, limit=None, split=None)
        if queries is not None:
            rows = read_table("queries", queries, skip_bad=fresh.skip_bad)
            asked = prepare("queries", rows, fresh, task or task_of("auto", network, rows), network, tokenizer)
        task = task or task_of("auto", network, table if table is not None else [{"text": "", "label": 0}])
        if device is not None:
            network.to(device)
        return cls(index, network, tokenizer, task, fresh, table, shown, asked, note)

    def warm(self) -> None:
        """Answer a question and drop the answer, so that the first one that is asked waits for nothing that is done once.

        A model that cannot take it says so to whoever asks first.
        """
        with suppress(InfluenceError):
            self.answer(Question("a", label="0" if self.task == "classification" else None))

    @property
    def methods(self) -> list[str]:
        """Methods that can be asked for; those that need curvature where the index keeps it."""
        if self.index.factory != "Flat":
            return [self.index.metric]
        kept = self.index.curvature
        ready = [name for name in METHODS if name in kept or (name == "trak" and "trackstar" in kept)]
        return [*METRICS, *ready]

    def names_of_queries(self, first: int, count: int) -> list[dict[str, str]]:
        """Some held-out queries, each ``name``, ``text`` and ``label``."""
        if self.queries is None:
            return []
        rows = range(first, min(first + count, len(self.queries)))
        return [
            {"name": str(i), "text": self._text_of(self.queries, i), "label": self._label_of(self.queries, i)}
            for i in rows
        ]

    def answer(
        self, question: Question, k: int = 10, method: str | None = None, seconds: float | None = None
    ) -> dict[str, Any]:
        """The ``k`` most helpful and most harmful rows, fewer where the index has fewer.

        Each has ``id``, ``score``, ``effect``, ``text``, ``label`` and ``groups``: what each group of layers adds to the
        score, by the sum of what layers add or take. ``seconds`` is how long the model may be waited for.

        Raises:
            InputError: unknown names or methods, ``k`` out of range, a text that the model cannot take.
            BusyError: the model was in use for longer than ``seconds``.
        """
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= MOST_ROWS:
            raise InputError(f"k: expected an int from 1 to {MOST_ROWS}, got {k!r}")
        how = self.index.metric if method is None else method
        if how not in self.methods:
            raise InputError(f"method: expected one of {', '.join(self.methods)}, got {how!r}")
        begun = time.perf_counter()
        asked = self._asked(question, seconds)
        rows: dict[str, list[dict[str, Any]]] = {}
        for name, harmful in (("helpful", False), ("harmful", True)):
            scores, found = self.index.search_rows(asked.gradients, min(k, len(self.index)), harmful, method=how)
            rows[name] = self._described(asked, found[0], scores[0], how)
        return {
            "question": {"text": asked.text, "label": asked.label},
            "method": how,
            "exact": self.index.factory == "Flat",
            "recall": self.index.recall,
            **rows,
            "tokens": asked.row is not None and self._table is not None,
            "seconds": time.perf_counter() - begun,
        }

    def tokens(self, question: Question, ids: Sequence[str], seconds: float | None = None) -> dict[str, Any]:
        """How much each token of the question has to do with some training rows, by one layer's whole gradients.

        ``tokens`` are ``text`` and ``influence``, which sum to the mean inner product with the rows (``dot``, whichever
        method found them); none, with ``note``, where no layer sees tokens one by one.

        Raises:
            InputError: rows that are not there, or whose text is not known. BusyError: as of :meth:`answer`.
        """
        if not 1 <= len(ids) <= MOST_ROWS:
            raise InputError(f"ids: expected 1 to {MOST_ROWS} rows, got {len(ids)}")
        asked = self._asked(question, seconds, gradients=False)
        if asked.row is None:
            raise InputError("question: its text is not known, and so are not its tokens")
        rows = [self._training_row(name) for name in ids]
        with self._in_turn(seconds):
            kind = ",".join(sorted(asked.row))
            if kind not in self._layer:
                self._layer[kind] = token_layer(self._model, [asked.row], self.index.layers)
            layer = self._layer[kind]
            if layer is None:
                return {"tokens": [], "note": "no indexed layer sees the tokens one by one"}
            found = token_influence(self._model, [asked.row], rows, layer)[0]
        numbers = torch.as_tensor(asked.row["input_ids"]).flatten().tolist()
        texts = [self._tokenizer.decode([number]) for number in numbers[: len(found)]]
        return {
            "tokens": [{"text": t, "influence": v} for t, v in zip(texts, found.tolist(), strict=True)],
            "note": f"by layer {layer}",
        }

    def _asked(self, question: Question, seconds: float | None, gradients: bool = True) -> _Asked:
        row: Mapping[str, Any] | None
        if question.row is not None:
            number = self._number_of(question.row)
            text, label = self._shown.get(question.row, ("", ""))
            row = self._training_row(question.row) if question.row in self._place else None
            return _Asked(self.index.gradients_at([number]), row, text, label)
        if question.query is not None:
            if self.queries is None or not question.query.isdecimal() or int(question.query) >= len(self.queries):
                raise InputError(
                    f"query: expected one of the {len(self.queries or ())} queries, got {question.query!r}"
                )
            samples, place = self.queries, int(question.query)
        else:
            samples, place = self._sample("text", self._row_of_text(question)), 0
        row = samples.rows[place]
        found = self._gradients(row, seconds) if gradients else {}
        return _Asked(found, row, self._text_of(samples, place), self._label_of(samples, place))

    def _row_of_text(self, question: Question) -> dict[str, Any]:
        row: dict[str, Any] = {"text": question.text}
        if self.task == "classification":
            if question.label is None or question.answer is not None:
                raise InputError("label: a classifier is asked with the class of the text")
            label = question.label
            return row | {"label": int(label) if label.removeprefix("-").isdecimal() else label}
        if question.label is not None:
            raise InputError("label: a language model is asked with an answer, or with a text alone")
        return row if question.answer is None else row | {"answer": question.answer}

    def _sample(self, argument: str, row: dict[str, Any]) -> Samples:
        given = DataSettings(
            answer="answer" if "answer" in row else None,
            label_names=self._settings.label_names,
            chat_template=self._settings.chat_template,
            as_chat=self._settings.as_chat and "answer" in row,
            truncate=self._settings.truncate,
        )
        return prepare(argument, [row], given, self.task, self._model, self._tokenizer)

    def _training_row(self, name: str) -> Mapping[str, Any]:
        if self._table is None or name not in self._place:
            raise InputError(f"row: the text of {name!r} is not known{f' ({self.note})' if self.note else ''}")
        # The whole table says what a column is; one row of it is made a sample.
        one = replace(self._table, rows=[self._table.rows[self._place[name]]], skipped=[], sources=[], lines=[])
        return prepare("data", one, self._settings, self.task, self._model, self._tokenizer).rows[0]

    def _number_of(self, name: str) -> int:
        if self._row_of is not None:
            if name in self._row_of:
                return self._row_of[name]
        elif name.isdecimal() and int(name) in self.index.ids:
            return self.index.ids.index(int(name))
        raise InputError(f"row: no row has the id {name!r}")

    def _gradients(self, row: Mapping[str, Any], seconds: float | None) -> dict[str, Tensor]:
        with self._in_turn(seconds):
            kind = tuple(sorted(row))
            if kind not in self._verified:
                # Once for each kind of row: what is verified is how the model's layers are captured.
                given = BuildSettings(self.index.layers, Projection.parse(self.index.meta["projection"]))
                self._verified[kind] = verified_settings(self._model, [row], given)[0]
            job = prepare_job(self._model, [row], self._verified[kind])
            with as_evaluated(self._model), job.capture:
                return job.compute(range(1)).gradients

    @contextmanager
    def _in_turn(self, seconds: float | None) -> Iterator[None]:
        """Hooks and gradients of the model are one question's at a time."""
        if not self._lock.acquire(timeout=-1 if seconds is None else seconds):
            raise BusyError("the model is busy with other questions; ask again")
        try:
            yield
        finally:
            self._lock.release()

    def _described(self, asked: _Asked, rows: Tensor, scores: Tensor, method: str) -> list[dict[str, Any]]:
        parts = self.index.by_layer(asked.gradients, rows.tolist(), method)
        whole = sum(part[0].abs() for part in parts.values())
        out = []
        for place, (row, score) in enumerate(zip(rows.tolist(), scores.tolist(), strict=True)):
            name = str(self.index.name_of(row))
            text, label = self._shown.get(name, ("", ""))
            total = float(whole[place])  # type: ignore[index]
            shares = {
                group: float(sum(parts[layer][0, place] for layer in members)) / total if total else 0.0
                for group, members in self._groups.items()
            }
            effect = "helpful" if score > 0 else "harmful" if score < 0 else "none"
            out.append({"id": name, "score": score, "effect": effect, "text": text, "label": label, "groups": shares})
        return out

    @staticmethod
    def _text_of(samples: Samples, place: int) -> str:
        return "" if samples.texts is None else str(samples.texts[place])

    @staticmethod
    def _label_of(samples: Samples, place: int) -> str:
        return "" if samples.labels is None else str(samples.labels[place])


def _training_rows(
    data: list[str], known: Remembered | None, settings: DataSettings
) -> tuple[Table | None, dict[str, tuple[str, str]], str]:
    """The training rows, text and label of each by name, and why there are none."""
    if not data and known is None:
        return None, {}, "the store does not say where its data are; --data FILE does"
    try:
        source = data or known.data  # type: ignore[union-attr]
        shown = shown_rows(source, known)
        return read_table("data", source, settings.split, settings.limit, settings.skip_bad), shown, ""
    except InputError as error:
        if data:
            raise
        return None, {}, f"{error} (--data FILE says where the data are)"
