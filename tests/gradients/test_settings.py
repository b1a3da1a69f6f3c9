"""Arguments of a build are refused by name."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
from torch import nn

import influence_fast as inf

IDENTITY = inf.Projection("identity")


def make_store(path: Path, model: nn.Module, dataset, **kwargs) -> inf.GradientStore:
    return inf.build_store(path, model, dataset, progress=False, **{"projection": IDENTITY, **kwargs})


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"loss": "hinge"}, "loss: expected a callable or one of auto"),
        ({"loss": "causal-lm"}, "does not fit labels"),
        ({"batch_tokens": 0}, "batch_tokens: expected 'auto' or a positive int, got 0"),
        ({"shard_rows": -1}, "shard_rows"),
        ({"projection": "fourier:3"}, "kind: expected one of identity"),
        ({"projection": "rademacher"}, "projection: expected identity"),
        ({"layers": "nope"}, "there are"),
        ({"dtype": "float8"}, "dtype"),
        ({"ids": [1, 2]}, "ids: expected one for each of the 5 rows, got 2"),
        ({"ids": [1] * 5}, "no two rows"),
    ],
)
def test_bad_arguments(tmp_path: Path, argument: dict, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        make_store(tmp_path / "s", models.make("bert"), models.rows(), **argument)
    assert not (tmp_path / "s").exists()
