"""Every error meant for a user's eyes. The command line prints the message alone and exits with 1."""

from __future__ import annotations


class InfluenceError(Exception):
    """Base of all errors raised on purpose by this package."""


class InputError(InfluenceError, ValueError):
    """An argument or a piece of data is not what was expected; the message names both."""


class StoreError(InfluenceError):
    """A gradient store is missing, damaged, or does not match what it is compared with."""


class BackendError(InfluenceError, RuntimeError):
    """A kernel backend was asked for that cannot run here; the message says why."""
