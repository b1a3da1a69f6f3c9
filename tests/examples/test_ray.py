"""The pipeline on a local Ray: its store has the rows that one build has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import models
import pytest

import influence_fast as inf

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray" / "gradients.py"


@pytest.mark.slow
def test_a_local_ray_writes_a_store(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    model, rows = models.make("bert"), models.rows(count=23)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--model", tmp_path / "model", "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "store"]
    given += ["--layers", "attention", "--projection", "rademacher:4x4", "--rows", 5, "--workers", 2, "--cpus", 0.5]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLE), *map(str, given)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "23 rows of 5 parts" in done.stdout
    store = inf.GradientStore.open(tmp_path / "store")
    alone = inf.build_store(
        tmp_path / "alone", model, rows, "attention", "rademacher:4x4", batch_tokens=4096, progress=False
    )
    assert list(store.ids) == list(range(23))
    for layer in alone.layers:
        difference = (store.read(layer) - alone.read(layer)).norm()
        assert difference <= 1e-5 * alone.read(layer).norm()
