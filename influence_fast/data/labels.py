"""Values of a label column as what a loss takes: class numbers, several of them, numbers; and names of classes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from influence_fast.data.chat import RowError
from influence_fast.data.tasks import config_of
from influence_fast.errors import InputError

_GENERIC = re.compile(r"LABEL_\d+")
# Frames with a gap hold whole numbers as ``1.0``, and write them so.
_WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
_NUMBER = re.compile(r"[+-]?\d*\.?\d+")


def is_missing(value: Any) -> bool:
    """Whether there is nothing: None, NaN, an empty cell."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class Classes:
    """The classes of a model: how many, and what they are called where anybody knows.

    Attributes:
        count: the model's outputs; None where its config does not say.
        names: by class number; None where the config numbers them only (``LABEL_0``) and nobody else names them.
        generic: names of that kind, which are taken too.
    """

    count: int | None
    names: list[str] | None
    generic: dict[str, int]

    def number(self, column: str, value: Any) -> int:
        """The class that a value names or numbers.

        Raises:
            RowError: a name that is not known, no whole number, a number out of range.
        """
        value = value.item() if hasattr(value, "item") else value
        if is_missing(value):
            raise RowError(f"has no {column}", empty=True)
        if isinstance(value, str):
            value = self._named(column, value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RowError(f"has {column} {value!r}, expected an int or a class name")
        if self.count is not None and not 0 <= value < self.count:
            raise RowError(f"has label {value}, expected an int from 0 to {self.count - 1}")
        return value

    def _named(self, column: str, text: str) -> int:
        text = text.strip()
        known = {**self.generic, **{name: number for number, name in enumerate(self.names or [])}}
        if text in known:
            return known[text]
        # Where classes are called by numbers, a number in text is a name.
        if _WHOLE.fullmatch(text) and not any(map(_WHOLE.fullmatch, self.names or [])):
            return int(text.partition(".")[0])
        if self.names:
            raise RowError(f"has {column} {text!r}, the model knows {', '.join(self.names)}")
        if _NUMBER.fullmatch(text):
            raise RowError(f"has {column} {text!r}, expected the number of a class, or its name")
        raise RowError(
            f"has {column} {text!r}, the model knows {', '.join(known) or 'class numbers alone'}; name its classes in the "
            "order of their numbers (--label-names NAME,NAME,...)"
        )

    def shown(self, number: int) -> str | int:
        """A class's name, or its number."""
        return self.names[number] if self.names and 0 <= number < len(self.names) else number


def classes_of(argument: str, model: nn.Module, given: Sequence[str] | None, of_data: Sequence[str] | None) -> Classes:
    """Who names the classes: the user, the model's config, or the data where the config has none.

    Raises:
        InputError: another number of names than the model has outputs; the data number the model's classes in another order.
    """
    config = config_of(model)
    count = getattr(config, "num_labels", None)
    by_number = {int(number): str(name) for number, name in (getattr(config, "id2label", None) or {}).items()}
    own = [by_number[number] for number in sorted(by_number)]
    generic = {name: number for number, name in enumerate(own)} if all(map(_GENERIC.fullmatch, own)) else {}
    if given is not None:
        if count is not None and len(given) != count:
            raise InputError(f"label_names: the model has {count} classes, got {len(given)} names ({', '.join(given)})")
        return Classes(count, list(given), generic)
    if own and not generic:
        both = [[name.casefold() for name in names] for names in (own, of_data or own)]
        if both[0] != both[1] and sorted(both[0]) == sorted(both[1]):
            raise InputError(
                f"{argument}: its classes are numbered {', '.join(of_data or [])}, the model's {', '.join(own)}; say which "
                "order the numbers follow (--label-names)"
            )
        return Classes(count, own, {})
    fits = of_data is not None and (count is None or len(of_data) == count)
    return Classes(count, list(of_data) if fits and of_data is not None else None, generic)


def numbers_of(column: str, value: Any, count: int | None) -> float | list[float]:
    """A target of regression: a number, or a list of as many as the model has outputs.

    Raises:
        RowError: no number, NaN.
    """
    values = value if isinstance(value, list | tuple) else [value]
    out = []
    for one in values:
        if is_missing(one):
            raise RowError(f"has no {column}", empty=True)
        try:
            number = float(one)
        except (TypeError, ValueError):
            raise RowError(f"has {column} {one!r}, expected a number") from None
        if not math.isfinite(number):
            raise RowError(f"has {column} {one!r}, expected a finite number")
        out.append(number)
    if count is not None and len(out) != count:
        raise RowError(f"has {len(out)} numbers in {column}, the model gives {count}")
    return out if isinstance(value, list | tuple) else out[0]


def several_classes(column: str, value: Any, classes: Classes, hot: bool) -> list[float]:
    """Multi-label: a list of 0 and 1 (``hot``), or the classes that apply, by name or number.

    Raises:
        RowError: no list, a class that is not known.
    """
    if isinstance(value, str):
        # Of a cell of a table: names joined by commas or bars, none where it is empty.
        value = [part.strip() for part in re.split(r"[,;|]", value) if part.strip()]
    if is_missing(value) or not isinstance(value, list | tuple):
        raise RowError(f"has {column} {value!r}, expected a list of classes")
    if classes.count is None:
        raise RowError(f"has {column} {value!r}, and the model does not say how many classes there are")
    if hot:
        return [float(one) for one in value]
    out = [0.0] * classes.count
    for one in value:
        out[classes.number(column, one)] = 1.0
    return out


def is_hot(values: Sequence[Any], count: int | None) -> bool:
    """Whether lists hold a 0 or 1 for each class, rather than the classes that apply."""
    lists = [value for value in values if isinstance(value, list | tuple)]
    return bool(lists) and all(len(value) == count and all(one in (0, 1) for one in value) for value in lists)


def flag_of(value: Any) -> bool | None:
    """True or false, as a flag, a number or a word; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(
            value.strip().lower()
        )
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None
