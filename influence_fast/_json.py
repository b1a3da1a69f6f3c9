"""JSON documents of other hands: read whole, and held against the types that are expected, before anything uses them."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from influence_fast.errors import InfluenceError, InputError

_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
_OF_JSON = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false"}


def read_object(path: Path, argument: str, error: type[InfluenceError] = InputError) -> dict[str, Any]:
    """The JSON object in a file; ``error`` names the argument, the file and what is wrong with it."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as reason:
        raise error(f"{argument}: cannot read {path} ({reason.strerror or reason})") from None
    except RecursionError:
        raise error(f"{argument}: cannot read {path} (it is nested too deeply)") from None
    except ValueError as reason:
        raise error(f"{argument}: cannot read {path} (no valid JSON: {reason})") from None
    if not isinstance(document, dict):
        kind = "null" if document is None else _OF_JSON[type(document)]
        raise error(f"{argument}: cannot read {path} (expected a JSON object, got {kind})")
    return document


def check_types(values: Mapping[str, Any], hints: Mapping[str, Any], of: str = "") -> None:
    """Raise InputError for the first value that its type hint does not allow; names without a hint may be anything.

    An int is no bool and a text no list; a whole number will do for a float. ``of`` comes before the name in the message.
    """
    for name, value in values.items():
        if name in hints and not fits(value, hints[name]):
            raise InputError(f"{of}{name}: expected {in_words(hints[name])}, got {_short(value)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type as hints spell them; a hint that is none of JSON's types allows anything."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if hint in (None, type(None)):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is str:
        return isinstance(value, str)
    if _is_list(hint, origin):
        inside = arguments[0] if arguments and arguments[0] is not Ellipsis else Any
        return (
            isinstance(value, Sequence) and not isinstance(value, str | bytes) and all(fits(v, inside) for v in value)
        )
    if (origin or hint) in (dict, Mapping):
        inside = arguments[1] if len(arguments) == 2 else Any
        return isinstance(value, Mapping) and all(fits(entry, inside) for entry in value.values())
    return True


def in_words(hint: Any) -> str:
    """What a hint allows, for a person."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        # Unions of the same types are one object, in the order of whoever wrote the first.
        return " or ".join(
            sorted({in_words(option) for option in arguments}, key=lambda words: (words == "null", words))
        )
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if hint in _WORDS:
        return _WORDS[hint]
    if hint is None:
        return "null"
    if _is_list(hint, origin):
        return "a list" + (
            f" of {in_words(arguments[0]).removeprefix('a ')}s" if arguments and arguments[0] in _WORDS else ""
        )
    if (origin or hint) in (dict, Mapping):
        return "an object"
    return getattr(hint, "__name__", str(hint))


def _is_list(hint: Any, origin: Any) -> bool:
    return (origin or hint) in (list, tuple, Sequence, set, frozenset)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
