"""Score files as kronfluence writes them, into our aggregation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import influence_fast as inf
from influence_fast import InputError
from influence_fast.compat.kronfluence import read_pairwise_scores


def test_scores_are_read_and_aggregated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = {"a.proj": torch.randn(3, 7).bfloat16(), "b": torch.randn(3, 7)}
    save_file(written, tmp_path / "pairwise_scores.safetensors")
    found = read_pairwise_scores(tmp_path)
    assert set(found) == set(written)
    for name, scores in found.items():
        assert scores.dtype == torch.float32
        assert torch.equal(scores, written[name].float())
    harmful = found["b"].clone()
    harmful[:, 4] = -50
    ranking = inf.aggregate({"a.proj": harmful, "b": harmful}, "rank")
    assert int(ranking.argmin()) == 4
    expected = sum(scores.double().mean(0) for scores in found.values()) / 2
    torch.testing.assert_close(inf.aggregate(found, "mean"), expected)
    noise = torch.arange(7) == 4
    assert inf.compare({("ekfac", "all", "rank"): ranking}, noise, levels=(0.3,), resamples=5).rows


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a score file"):
        read_pairwise_scores(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"no scores")
    with pytest.raises(InputError, match="expected a score file"):
        read_pairwise_scores(tmp_path / "x.safetensors")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2)}, tmp_path / "y.safetensors")
    with pytest.raises(InputError, match=r"one shape, got \[\(2,\), \(2, 3\)\]"):
        read_pairwise_scores(tmp_path / "y.safetensors")
