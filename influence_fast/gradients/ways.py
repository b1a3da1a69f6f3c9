"""Which way each layer of a model is captured, and which other ways there are to try."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from influence_fast.gradients.layers import Expert, every_layer
from influence_fast.gradients.plain_layers import is_matrix, vector_owners
from influence_fast.gradients.settings import BuildSettings

_LAYOUTS = ("grouped", "second", "parts")
_ORDER = (*_LAYOUTS, "followed", "exact")


@dataclass
class Ways:
    """How layers are captured: by hooks, unless they are named here; whole batches, unless ``one_row``.

    ``why`` says of the layers that autograd takes what is wrong with the faster ways. A layer goes through other places of
    its samples, ``followed`` and ``exact`` in turn, none of them twice.
    """

    exact: dict[str, None] = field(default_factory=dict)
    followed: dict[str, None] = field(default_factory=dict)
    layouts: dict[str, str] = field(default_factory=dict)
    one_row: bool = False
    why: dict[str, str] = field(default_factory=dict)
    can_follow: frozenset[str] = frozenset()
    tried: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def first(cls, model: nn.Module, layers: Iterable[str]) -> Ways:
        """Hooks for everything that has one; vectors and matrices that have none are looked for where they are used."""
        (matrices, others), owners = every_layer(model), vector_owners(model)
        parameters = {name: other for name, other in others.items() if isinstance(other, nn.Parameter)}
        bare = {
            name for name in layers if name in parameters and name not in owners and parameters[name].dim() in (1, 2)
        }
        matrix = {name for name in layers if name in matrices and not isinstance(matrices[name], Expert)}
        matrix |= {name for name in layers if name in owners and is_matrix(owners[name][0])}
        return cls(followed=dict.fromkeys(sorted(bare)), one_row=True, can_follow=frozenset(matrix | bare))

    def in_batches(self) -> Ways:
        """The same for whole batches."""
        return replace(
            self,
            exact=dict(self.exact),
            followed=dict(self.followed),
            layouts=dict(self.layouts),
            one_row=False,
            why=dict(self.why),
            tried=set(self.tried),
        )

    def of(self, settings: BuildSettings) -> BuildSettings:
        """The settings with these ways."""
        return replace(
            settings,
            exact=list(self.exact),
            followed=list(self.followed),
            layouts=dict(self.layouts),
            one_row=self.one_row,
        )

    def take(self, remedies: Mapping[str, str], why: str) -> bool:
        """Give layers the way that capture itself proposes; False where none of them has another."""
        moved = []
        for name, remedy in remedies.items():
            # Where samples are not in the place that was looked at last, another place is tried first.
            place = self.layouts.get(name)
            first = _ORDER.index(place) + 1 if place in _LAYOUTS else _ORDER.index(remedy)
            moved.append(self._move(name, first, why))
        return any(moved)

    def advance(self, errors: Mapping[str, str]) -> bool:
        """Give layers that are wrong, for these reasons, the next way that they have not had."""
        moved = [self._move(name, _ORDER.index("second"), why) for name, why in errors.items()]
        return any(moved)

    def _move(self, name: str, first: int, why: str) -> bool:
        """To the first way from there on that is left."""
        if name in self.exact:
            return False
        for way in _ORDER[first:]:
            possible = (name, way) not in self.tried
            if way in _LAYOUTS:
                possible = possible and not self.one_row
            elif way == "followed":
                possible = possible and name in self.can_follow and name not in self.followed
            if not possible:
                continue
            self.tried.add((name, way))
            self.layouts.pop(name, None)
            if way in _LAYOUTS:
                self.layouts[name] = way
            elif way == "followed":
                self.followed[name] = None
            else:
                self.followed.pop(name, None)
                self.exact[name], self.why[name] = None, why
            return True
        return False
