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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence_fast.errors import StoreError

# file, key, value -> nothing, or a StoreError that names all three
Check = Callable[[str, str, Any], None]
_SEAL = b'"seal": "'
_LINE_SEAL = b'"seal":"'
_HEX = re.compile(rb"[0-9a-f]{64}")
PLAIN_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}"
SHA256 = r"[0-9a-f]{64}"
XXH3 = r"[0-9a-f]{16}"


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
    if not re.fullmatch(PLAIN_NAME, name):
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


def whole(least: int = 0, most: int = 2**62) -> Check:
    """A whole number in a range."""

    def check(file: str, key: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _wrong(file, key, f"a whole number from {least} to {most}", value)

    return check


def real(file: str, key: str, value: Any) -> None:
    """A number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(file, key, "a number", value)


def truth(file: str, key: str, value: Any) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise _wrong(file, key, "true or false", value)


def text(pattern: str | None = None, what: str = "text") -> Check:
    """Text, of a pattern if one is given."""

    def check(file: str, key: str, value: Any) -> None:
        if not isinstance(value, str) or (pattern is not None and not re.fullmatch(pattern, value)):
            raise _wrong(file, key, what, value)

    return check


def one_of(*choices: Any) -> Check:
    """One of some values."""

    def check(file: str, key: str, value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise _wrong(file, key, " or ".join(map(repr, choices)), value)

    return check


def items(of: Check, count: int | None = None) -> Check:
    """A list, of so many if ``count`` is given."""

    def check(file: str, key: str, value: Any) -> None:
        if not isinstance(value, list) or (count is not None and len(value) != count):
            raise _wrong(file, key, "a list" if count is None else f"a list of {count}", value)
        for number, item in enumerate(value):
            of(file, f"{key}[{number}]", item)

    return check


def table(of: Check | None = None, least: int = 0) -> Check:
    """An object of any keys."""

    def check(file: str, key: str, value: Any) -> None:
        if not isinstance(value, dict) or len(value) < least:
            raise _wrong(file, key, "an object" + (" that is not empty" if least else ""), value)
        for name, item in value.items() if of is not None else ():
            of(file, f"{key}.{name}", item)  # type: ignore[misc]

    return check


def record(needed: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """An object with given keys; others, which a later version may have, are ignored."""

    def check(file: str, key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise _wrong(file, key, "an object", value)
        for name, of in needed.items():
            if name not in value:
                raise StoreError(f"{file} is damaged: it lacks {f'{key}.{name}' if key else name}")
            of(file, f"{key}.{name}" if key else name, value[name])
        for name, of in (optional or {}).items():
            if name in value:
                of(file, f"{key}.{name}" if key else name, value[name])

    return check


def maybe(of: Check) -> Check:
    """null, or something."""

    def check(file: str, key: str, value: Any) -> None:
        if value is not None:
            of(file, key, value)

    return check


def _wrong(file: str, key: str, expected: str, value: Any) -> StoreError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return StoreError(f"{file} is damaged: {key or 'content'}: expected {expected}, got {shown}")


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
