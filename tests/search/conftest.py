"""One small store with ties, which searches read and nobody changes."""

from __future__ import annotations

import pytest
from stores import gradients, write_store

import influence_fast as inf


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> inf.GradientStore:
    data = gradients(300, 0)
    for name in data:
        data[name][200:220] = data[name][7]  # ties, at the cut too
    return write_store(tmp_path_factory.mktemp("s") / "s", data, shard_rows=70)
