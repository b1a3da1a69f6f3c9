"""Other libraries' names on our operations: ``influence_fast.patch("trak")``, or a plain import from here.

One module a library, loaded when it is asked for; the libraries themselves are no dependencies.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any

from influence_fast.errors import InputError

NAMES = ("bergson", "trak", "fast_jl", "sjlt", "dattri", "less", "captum")
# Whole modules of ours that stand where an import looks for theirs.
_MODULES = ("fast_jl", "sjlt")
_active: dict[str, Patch] = {}


def __getattr__(name: str) -> ModuleType:
    if name in (*NAMES, "kronfluence"):
        return importlib.import_module(f"influence_fast.compat.{name}")
    raise AttributeError(f"module 'influence_fast.compat' has no attribute {name!r}")


class Patch:
    """What :func:`patch` replaced; a context manager that undoes it at its end.

    ``places`` names each attribute that is ours now, such as ``trak.traker.BasicProjector``.
    """

    def __init__(self, name: str, places: tuple[str, ...], undo: list[Callable[[], None]]) -> None:
        self.name, self.places, self._undo = name, places, undo

    def undo(self) -> None:
        """Put back what was there before; a second call does nothing."""
        while self._undo:
            self._undo.pop()()
        if _active.get(self.name) is self:
            del _active[self.name]

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"Patch({self.name!r}, places={self.places!r})"


def patch(name: str) -> Patch:
    """Put our operations in the place of a library's own, wherever its loaded modules hold them.

    A second call changes nothing and returns what the first one did.

    Args:
        name: ``bergson`` (its random matrices), ``trak`` and ``dattri`` (their projectors), ``less`` (its gradient
            collection), ``captum`` (TracInCP and TracInCPFast), ``fast_jl`` or ``sjlt`` (the modules, installed or not).

    Raises:
        InputError: an unknown name, a library that is not installed, or a version of it that this one does not know.
    """
    if name not in NAMES:
        raise InputError(f"name: expected one of {', '.join(NAMES)}, got {name!r}")
    if name in _active:
        return _active[name]
    ours = importlib.import_module(f"influence_fast.compat.{name}")
    places: list[str] = []
    undo: list[Callable[[], None]] = []
    if name in _MODULES:
        _replace_module(name, ours, undo)
        places.append(f'sys.modules["{name}"]')
    else:
        _check_version(ours.DISTRIBUTION, ours.VERSIONS)
        for module in ours.MODULES:
            importlib.import_module(module)
        for module, attribute in ours.REPLACED:
            original, own = getattr(sys.modules[module], attribute), getattr(ours, attribute)
            # Modules that imported it by name hold it too.
            for path, loaded in list(sys.modules.items()):
                held = vars(loaded).get(attribute) if isinstance(loaded, ModuleType) else None
                if held is original and path.split(".")[0] in ours.HOLDERS:
                    places.append(f"{path}.{attribute}")
                    undo.append(_set(loaded, attribute, own))
    _active[name] = Patch(name, tuple(places), undo)
    return _active[name]


def _set(module: ModuleType, attribute: str, value: Any) -> Callable[[], None]:
    before = getattr(module, attribute)
    setattr(module, attribute, value)
    return lambda: setattr(module, attribute, before)


def _replace_module(name: str, ours: ModuleType, undo: list[Callable[[], None]]) -> None:
    before = sys.modules.get(name)
    sys.modules[name] = ours

    def restore() -> None:
        if before is None:
            sys.modules.pop(name, None)
        else:
            sys.modules[name] = before

    undo.append(restore)


def _check_version(distribution: str, known: tuple[str, ...]) -> None:
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"name: expected {distribution} to be installed") from None
    if found not in known:
        raise InputError(f"{distribution}: expected version {' or '.join(known)}, got {found}")
