"""How a command ends when it is told to stop: as Control-C does, for every signal that asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# What a service manager, a scheduler and a closed terminal send.
_ASKING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
_GOES_ON = {
    "audit": "What was written is whole: the same command goes on from there",
    "build": "Shards that were written are whole: the same command goes on from there",
    "score": "With --checkpoint the same command goes on from the last checkpoint; without it nothing was written",
    "index": "What was there before is as it was; run the same command to begin again",
    "demo": "Run the same command in a new folder to begin again",
}


class Stopped(KeyboardInterrupt):
    """A signal other than SIGINT asked to stop; unwinds as Control-C does, so that files are closed and locks released."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopping_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP raise :class:`Stopped`, once: a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Stopped(number)

    before: dict[Any, Any] = {}
    for number in _ASKING:
        # One that is ignored, as under nohup, stays so; one that somebody handles is theirs.
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(error: KeyboardInterrupt, command: str | None) -> tuple[str, int]:
    """What to say, and the exit code: 128 and the signal's number, as a shell has it."""
    number = error.number if isinstance(error, Stopped) else signal.SIGINT
    rest = _GOES_ON.get(command or "")
    return f"stopped by {signal.Signals(number).name}" + (f". {rest}" if rest else ""), 128 + number
