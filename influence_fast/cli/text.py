"""What a terminal is sent: plain text, in which control characters can be seen."""

from __future__ import annotations

import logging
import sys
import unicodedata
from typing import Any

# They turn the text around that follows.
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def visible(value: Any) -> str:
    """Text without anything that a terminal obeys: controls as pictures (U+2400 and on) or escapes, on one line."""
    text = str(value)
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_seen, text))


def lines(text: str) -> str:
    """The same for a message of several lines of our own."""
    return "\n".join(map(visible, text.split("\n")))


def _seen(character: str) -> str:
    number = ord(character)
    if number < 0x20:
        return chr(0x2400 + number)
    if number == 0x7F:
        return "\u2421"
    if number in _TURNING or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
    return character


class PlainFormatter(logging.Formatter):
    """Log lines that a terminal may be sent."""

    def format(self, record: logging.LogRecord) -> str:
        return lines(super().format(record))


def escape_what_cannot_be_written() -> None:
    """A terminal or file of another encoding gets escapes instead of an exception at a job's end."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if callable(reconfigure):
            reconfigure(errors="backslashreplace")
