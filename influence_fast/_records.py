"""JSON from files, which is believed only after it was checked: sealed documents, chained lines, and the types in them.

A *sealed* document is a JSON object whose last member ``seal`` is the SHA-256 of all bytes of the file before its value. A
*chained* line is a JSON object on a line of its own with ``before``, the seal of the line above, and ``seal``, the SHA-256
of all bytes of the line before its value: a last line that was cut short is known by its missing line end, and a line that
was changed, moved, doubled or taken out by its checksum or by the one of the line below.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from influence_fast.errors import StoreError

_SEAL = b'"seal": "'
_LINE_SEAL = b'"seal":"'
_HEX = re.compile(rb"[0-9a-f]{64}")
_PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}"


def parse(where: str, raw: bytes) -> Any:
    """JSON in UTF-8, each key once and no NaN; StoreError names ``where``."""
    try:
        return json.loads(raw.decode(), object_pairs_hook=_each_key_once, parse_constant=_no_constant)
    except RecursionError:
        raise StoreError(f"{where} is damaged (nested too deeply)") from None
    except ValueError as error:
        raise StoreError(f"{where} is damaged ({error})") from None


def seal(document: Mapping[str, Any]) -> bytes:
    """The bytes of a sealed document."""
    body = json.dumps(document, indent=1).removesuffix("\n}").encode() + b",\n " + _SEAL
    return body + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def check_seal(where: str, raw: bytes) -> None:
    """StoreError unless the bytes are those of a sealed document, unchanged."""
    body, digest, end = raw[:-68], raw[-68:-4], raw[-4:]
    if not (body.endswith(_SEAL) and end == b'"\n}\n' and hashlib.sha256(body).hexdigest().encode() == digest):
        raise StoreError(f"{where} is damaged (its checksum does not fit its content)")


def unseal(where: str, raw: bytes) -> dict[str, Any]:
    """The object in a sealed document."""
    check_seal(where, raw)
    found = parse(where, raw)
    del found["seal"]
    return found


def chained(before: str, entry: Mapping[str, Any]) -> tuple[bytes, str]:
    """A line that follows the one with seal ``before``, and its own seal."""
    text = json.dumps({**entry, "before": before}, separators=(",", ":"))
    body = text.removesuffix("}").encode() + b"," + _LINE_SEAL
    digest = hashlib.sha256(body).hexdigest()
    return body + digest.encode() + b'"}\n', digest


@dataclass
class Chain:
    """What a file of chained lines holds.

    Attributes:
        entries: of the lines whose own checksum holds, in the file's order.
        last: seal of the last line.
        torn: whether the file ends in the middle of a line, which is dropped.
        damage: the first thing that is wrong otherwise, or None.
    """

    last: str
    entries: list[dict[str, Any]] = field(default_factory=list)
    torn: bool = False
    damage: str | None = None


def unchain(where: str, raw: bytes, start: str) -> Chain:
    """Read chained lines; the first follows the seal ``start``."""
    chain = Chain(start)
    lines = raw.split(b"\n")
    chain.torn = bool(lines.pop())
    for number, line in enumerate(lines, 1):
        # 64 digits and the end of the object.
        body, digest, end = line[:-66], line[-66:-2], line[-2:]
        whole = body.endswith(_LINE_SEAL) and end == b'"}' and _HEX.fullmatch(digest) is not None
        if not whole or hashlib.sha256(body).hexdigest().encode() != digest:
            chain.damage = chain.damage or f"{where}: line {number} is damaged (its checksum does not fit its content)"
            chain.last = ""
            continue
        entry = parse(f"{where}: line {number}", line)
        if entry.pop("before", None) != chain.last and chain.damage is None:
            chain.damage = f"{where}: line {number} does not follow the line before it"
        chain.last = entry.pop("seal")
        chain.entries.append(entry)
    return chain


def last_seal(line: bytes, start: str) -> str:
    """Seal of a whole chained line, or ``start`` where there is none."""
    return line.rstrip(b"\n")[-66:-2].decode() if line else start


def inside(folder: Path, name: str) -> Path:
    """The file ``name`` of ``folder``, for a name that was read from a file there.

    Raises:
        StoreError: it names or links to something outside, or is there and no plain file (a pipe would never end).
    """
    path = folder / name
    if not re.fullmatch(_PLAIN_NAME, name):
        raise StoreError(f"{folder}: names the file {name!r}, expected one inside this folder")
    try:
        if path.is_symlink() and path.resolve().parent != folder.resolve():
            raise StoreError(f"{path}: is a link that leads out of its folder")
        if path.exists() and not path.is_file():
            raise StoreError(f"{path}: expected a file, found something else")
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from None
    return path


def read_bytes(path: Path, missing: str) -> bytes:
    """All of a small file; StoreError with ``missing`` where there is none."""
    try:
        if path.exists() and not path.is_file():
            raise StoreError(f"{path}: expected a file, found something else")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(missing) from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from None


# ------------------------------------------------------------------------------------------------- types of what was read
# Documents are TypedDicts; other keys, which a later version may have, are ignored.


def matching(pattern: str, what: str) -> AfterValidator:
    """Allows texts that a pattern matches as a whole, with anything that JSON can hold in them."""

    def check(value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


def one_of(*choices: str) -> AfterValidator:
    """Allows some texts."""
    return matching("|".join(map(re.escape, choices)), " or ".join(map(repr, choices)))


Whole = Annotated[int, Field(ge=0, le=2**62)]
Positive = Annotated[int, Field(ge=1, le=2**40)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Pair = Annotated[list[Whole], Field(min_length=2, max_length=2)]
# Not str, which has no place for half of a surrogate pair: Python's file names and texts may hold one.
Text = Annotated[Any, matching(r"(?s:.*)", "text")]
PlainName = Annotated[Any, matching(_PLAIN_NAME, "the name of a file in this folder")]
Sha256 = Annotated[Any, matching(r"[0-9a-f]{64}", "64 hexadecimal digits")]
Xxh3 = Annotated[Any, matching(r"[0-9a-f]{16}", "16 hexadecimal digits")]


# The words of JSON, where pydantic's are those of Python.
_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
}


class Schema:
    """What a document must be: a TypedDict, held against values that were read.

    An int is no bool and no float; a whole number will do for a float.
    """

    def __init__(self, kind: Any) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def check(self, where: str, value: Any) -> None:
        """StoreError names the place, the key, what came and what was expected."""
        try:
            self._adapter.validate_python(value, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            steps = (f"[{step}]" if isinstance(step, int) else f".{step}" for step in first["loc"])
            key = "".join(steps).removeprefix(".") or "content"
            if first["type"] == "missing":
                raise StoreError(f"{where} is damaged: it lacks {key}") from None
            if first["type"] in _WORDS:
                expected = _WORDS[first["type"]].format(**first.get("ctx", {}))
            else:
                expected = re.sub(r"^(Input should be|Value error,) ", "", first["msg"])
            shown = repr(first["input"])
            shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
            raise StoreError(f"{where} is damaged: {key}: expected {expected}, got {shown}") from None


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
