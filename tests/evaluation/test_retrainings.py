"""What a folder of retrainings depends on, and that it is checked."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.evaluation.retrainings import Retraining, fingerprint, retrained_losses

JOBS = [Retraining(torch.arange(i + 1), i) for i in range(3)]


def make(scale: float):
    def train(rows: torch.Tensor) -> float:
        return scale * float(rows.sum())

    return train


def losses(model: float) -> torch.Tensor:
    return torch.tensor([model, float("inf"), float("nan")])


def test_losses_of_each_job_and_no_job_twice(tmp_path: Path) -> None:
    found = retrained_losses([*JOBS, JOBS[1]], make(2.0), losses, 3, folder=tmp_path)
    assert found[:, 0].tolist() == [0, 2, 6, 2]
    assert found[:, 1].tolist() == [float("inf")] * 4
    assert found[:, 2].isnan().all()
    assert len(list(tmp_path.glob("*.json"))) == 4, "three jobs, and what they depend on"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": make(3.0)}, "another code or data of `train`; choose"),
        ({"losses": lambda model: torch.tensor([model])}, "another code or data of `losses`"),
        ({"rows": 4}, "another number of training rows"),
        ({"depends_on": {"data": "v2"}}, "another `depends_on`"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, change, message: str) -> None:
    settings = {"train": make(2.0), "losses": losses, "rows": 3, "depends_on": {"data": "v1"}}
    retrained_losses(JOBS, **settings, folder=tmp_path)
    retrained_losses(JOBS, **settings, folder=tmp_path)
    with pytest.raises(inf.StoreError, match=message):
        retrained_losses(JOBS, **{**settings, **change}, folder=tmp_path)


def test_damage_is_found(tmp_path: Path) -> None:
    retrained_losses(JOBS, make(2.0), losses, 3, folder=tmp_path)
    file, other = (tmp_path / f"{job.name}.json" for job in JOBS[1:])
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"2.0", b"3.0"))
    with pytest.raises(inf.StoreError, match="checksum does not fit"):
        retrained_losses(JOBS, make(2.0), losses, 3, folder=tmp_path)
    file.write_bytes(other.read_bytes())
    with pytest.raises(inf.StoreError, match="another retraining than its name says"):
        retrained_losses(JOBS, make(2.0), losses, 3, folder=tmp_path)
    (tmp_path / "retrainings.json").unlink()
    with pytest.raises(inf.InputError, match="something else than retrainings"):
        retrained_losses(JOBS, make(2.0), losses, 3, folder=tmp_path)


def test_models_must_have_as_many_losses() -> None:
    with pytest.raises(inf.InputError, match="got 1 of one and 3 of another"):
        retrained_losses(JOBS, lambda rows: len(rows), lambda count: torch.zeros(count), 3)


def test_fingerprints_tell_contents_apart() -> None:
    module = torch.nn.Linear(2, 2)
    values = [
        1, 1.0, True, "a", b"a", None, [1, 2], (1, 2), [2, 1], {"a": 1}, {"a": 2}, {"b": 1}, torch.zeros(2), torch.zeros(3),
        torch.ones(2), torch.zeros(2).double(), torch.zeros(2).bfloat16(), torch.zeros(0), np.zeros(2), np.ones(2), module,
        make(1.0), make(2.0), functools.partial(make, 1.0), functools.partial(make, 2.0), {1, 2}, {1, 3}, [[1], [2]],
    ]  # fmt: skip
    found = [fingerprint(value) for value in values]
    assert len(set(found)) == len(values)
    assert fingerprint(make(1.0)) == fingerprint(make(1.0))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    before = fingerprint(module)
    with torch.no_grad():
        module.weight.add_(1)
    assert fingerprint(module) != before
    loop: list[object] = []
    loop.append(loop)
    assert len(fingerprint(loop)) == 64


def test_files_are_sealed_json(tmp_path: Path) -> None:
    retrained_losses(JOBS[:1], make(2.0), lambda model: torch.tensor([model]), 3, folder=tmp_path)
    document = json.loads((tmp_path / f"{JOBS[0].name}.json").read_text(encoding="utf-8"))
    assert (document["rows"], document["seed"], document["losses"]) == (1, 0, [0.0])
