"""The shapes that operations are timed at, and shapes of one's own from a file."""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from influence_fast.errors import InputError


@dataclass(frozen=True)
class OuterShape:
    """Of an operation on outer products: samples, tokens, inputs, outputs, projected numbers or queries, kind of side."""

    n: int
    t: int
    i: int
    o: int
    k: int = 16
    kind: str = "rademacher"


@dataclass(frozen=True)
class SketchShape:
    """Of a sketch: rows of d numbers to k of them."""

    n: int
    d: int
    k: int
    kind: str = "rademacher"


@dataclass(frozen=True)
class RankShape:
    """Of an influence matrix: queries and training rows."""

    m: int
    n: int


Shape = OuterShape | SketchShape | RankShape
Shapes = dict[str, dict[str, Shape]]

SHAPES: Shapes = {
    "project_outer": {
        "small": OuterShape(32, 16, 384, 384),
        "d1024": OuterShape(16, 128, 1024, 1024),
        "d1024-sjlt": OuterShape(16, 128, 1024, 1024, kind="sjlt"),
        "mistral-7b mlp-sjlt": OuterShape(2, 512, 4096, 14336, k=128, kind="sjlt"),
        "roberta-large mlp": OuterShape(8, 128, 1024, 4096),
        "llama-1b mlp": OuterShape(4, 512, 2048, 8192, k=64),
        "qwen-1.5b mlp": OuterShape(4, 512, 1536, 8960, k=64),
        "mistral-7b mlp": OuterShape(2, 512, 4096, 14336, k=64),
    },
    "sketch_outer": {"1024": OuterShape(16, 128, 1024, 1024, k=4096, kind="sjlt")},
    "outer": {"minilm": OuterShape(32, 16, 384, 384)},
    "score_outer": {"1024": OuterShape(16, 128, 1024, 1024, k=8)},
    "ghost_dot": {
        "1024": OuterShape(16, 64, 1024, 1024),
        # Rows of a store that are kept as factors: a token is a pair of vectors.
        "factors-1": OuterShape(1024, 1, 64, 64),
        "factors-4": OuterShape(1024, 4, 64, 64),
    },
    "ghost_norm": {"1024": OuterShape(16, 128, 1024, 1024)},
    "sketch": {
        "589k-dense": SketchShape(16, 589_824, 512),
        "589k-sjlt": SketchShape(16, 589_824, 512, "sjlt"),
    },
    "rank": {"200x100k": RankShape(200, 100_000)},
    "vote": {"200x100k": RankShape(200, 100_000)},
}
OPS = tuple(SHAPES)
_TYPES: dict[str, type[Shape]] = {op: type(next(iter(shapes.values()))) for op, shapes in SHAPES.items()}
_KINDS = ("rademacher", "gaussian", "sjlt")


def read_shapes(path: str | Path) -> Shapes:
    """Shapes by operation and name, of a JSON file such as ``{"outer": {"mine": {"n": 8, "t": 16, "i": 64, "o": 64}}}``.

    Fields are those of the built-in shapes (:data:`SHAPES`); ``k`` and ``kind`` may be left out where these have a default.

    Raises:
        InputError: no such JSON, an unknown operation or field, or a size that is no positive whole number.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"shapes: expected a JSON file, {path} is none ({error})") from None
    found: Shapes = {}
    for op, named in _object(f"shapes: {path}", document).items():
        if op not in _TYPES:
            raise InputError(f"shapes: {path}: expected some of {', '.join(OPS)}, got {op!r}")
        found[op] = {name: _shape(op, name, given) for name, given in _object(f"shapes: {op}", named).items()}
    if not any(found.values()):
        raise InputError(f"shapes: {path} holds no shape")
    return found


def described(shape: Shape) -> dict[str, Any]:
    """The shape as JSON has it."""
    return asdict(shape)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, got {value!r}")
    return value


def _shape(op: str, name: str, given: Any) -> Shape:
    where = f"shapes: {op} {name}"
    wanted = {field.name: field for field in fields(_TYPES[op])}
    values = _object(where, given)
    for field in values.keys() - wanted.keys():
        raise InputError(f"{where}: expected fields {', '.join(wanted)}, got {field!r}")
    for field, about in wanted.items():
        if about.default is MISSING and field not in values:
            raise InputError(f"{where}: {field} is missing")
    for field, value in values.items():
        if field == "kind":
            if value not in _KINDS:
                raise InputError(f"{where}: kind: expected one of {', '.join(_KINDS)}, got {value!r}")
        elif type(value) is not int or not 0 < value < 1 << 31:
            raise InputError(f"{where}: {field}: expected a whole number from 1 to 2^31 - 1, got {value!r}")
    shape = _TYPES[op](**values)
    if op == "vote" and isinstance(shape, RankShape) and shape.n < 5:
        raise InputError(f"{where}: n: expected at least 5, of which a fifth votes, got {shape.n}")
    return shape
