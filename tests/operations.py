"""Operations called alike, with what each takes beside ``x`` and ``dy``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_fast import ops
from influence_fast.ops.projections import Side


@dataclass
class Extras:
    """What an operation takes beside ``x`` and ``dy``."""

    p_in: Any
    p_out: Any
    single: Any
    q: Tensor
    scale: Tensor | None
    xb: Tensor
    dyb: Tensor

    def absolute(self, op: str) -> Extras:
        """The same with absolute values, matrices dense: those that ``op`` takes, as others may be far larger."""

        def dense(p: Any) -> Any:
            return p if p is None else (p if isinstance(p, Tensor) else p.matrix(torch.float64)).abs().double()

        scale = None if self.scale is None else self.scale.abs()
        project, sketch = op == "project_outer", op == "sketch_outer"
        sides = (self.p_in if project else None, self.p_out if project else None, self.single if sketch else None)
        return Extras(*map(dense, sides), self.q.abs(), scale, self.xb.abs(), self.dyb.abs())


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def make_extras(generator: torch.Generator, i: int, o: int, kind: str, k: int, scaled: bool = True) -> Extras:
    def side(name: str, rows: int, features: int) -> Any:
        return random(generator, rows, features) if kind == "dense" else Side(kind, name, rows, features)

    scale = random(generator, o, i) if scaled else None
    sides = (side("a/right", k, i), side("a/left", k + 3, o), side("a/single", k, i * o))
    return Extras(*sides, random(generator, 5, o, i), scale, random(generator, 3, 6, i), random(generator, 3, 6, o))


def call(op: str, x: Tensor, dy: Tensor, lengths: Tensor | None, e: Extras, backend: str) -> Tensor:
    def on(value: Any) -> Any:
        return value.to(x.device) if isinstance(value, Tensor) else value

    if op == "outer":
        return ops.outer(x, dy, lengths, backend=backend)
    if op == "project_outer":
        return ops.project_outer(x, dy, on(e.p_in), on(e.p_out), lengths, backend=backend)
    if op == "sketch_outer":
        return ops.sketch_outer(x, dy, on(e.single), lengths, on(e.scale), backend=backend)
    if op == "score_outer":
        return ops.score_outer(x, dy, on(e.q), lengths, backend=backend)
    if op == "ghost_dot":
        return ops.ghost_dot(x, dy, e.xb.to(x), e.dyb.to(x), lengths, backend=backend)
    return ops.ghost_norm(x, dy, lengths, backend=backend)
