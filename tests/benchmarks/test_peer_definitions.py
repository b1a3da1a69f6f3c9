"""Definitions beside other libraries: our side against their formulas, the libraries where they are, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import peer_definitions
from benchmarks.peer_definitions import (
    OurEkfac,
    OurTrackstar,
    alike,
    apart,
    make_task,
    over_seeds,
    said,
    second_moments,
)

SETTINGS = {"rows": 12, "queries": 4, "width": 4, "steps": 3, "seeds": 2}


def test_our_curvature_of_the_given_labels_is_that_of_influence(tmp_path: Path) -> None:
    task = make_task(SETTINGS, dtype=torch.float64)
    ours = OurEkfac(task, tmp_path)
    assert alike("", ours.default(), ours.scores(task.rows))["relative_difference"] < 1e-5
    assert alike("", ours.scores(task.sampled), ours.scores(task.rows))["relative_difference"] > 1e-2


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_mixed_gram_matrix_and_one_length_over_layers(share: float, tmp_path: Path) -> None:
    task = make_task(SETTINGS)
    ours = OurTrackstar(task, tmp_path, normalise=True)
    plain = OurTrackstar(task, tmp_path / "plain")
    products, lengths = torch.zeros(4, 12).double(), [torch.zeros(4).double(), torch.zeros(12).double()]
    for name, moments in second_moments(task).items():
        sides = [part[name] / (moments.sqrt() + 1e-8).flatten() for part in (plain.queries, plain.train)]
        v, g = (side.double() for side in sides)
        gram = (1 - share) * g.T @ g / 12 + share * v.T @ v / 4
        values, vectors = torch.linalg.eigh(gram)
        root = vectors / (values.clamp_min(0) + 0.1 * values.mean()).sqrt() @ vectors.T
        v, g = v @ root, g @ root
        products += v @ g.T
        lengths = [lengths[0] + v.square().sum(1), lengths[1] + g.square().sum(1)]
    expected = products / (lengths[0][:, None] * lengths[1]).sqrt()
    torch.testing.assert_close(ours.scores(share), expected, rtol=1e-4, atol=1e-5)


def test_labels_are_drawn_where_the_given_ones_stand() -> None:
    task = make_task(SETTINGS)
    for drawn, row in zip(task.sampled, task.rows, strict=True):
        assert drawn["input_ids"] == row["input_ids"]
        assert len(drawn["labels"]) == len(row["labels"])
        assert drawn["labels"][0] == -100
    assert any(drawn["labels"][1:] != row["labels"][1:] for drawn, row in zip(task.sampled, task.rows, strict=True))


def test_differences_and_correlations() -> None:
    one = torch.arange(20.0).reshape(2, 10)
    assert alike("x", one, one) == {"what": "x", "relative_difference": 0.0}
    assert alike("x", {"a": one, "b": 1.1 * one}, {"a": one, "b": one})["relative_difference"] == pytest.approx(0.1)
    expected = {"what": "x", "spearman": 1.0, "least": 1.0, "lowest": 1.0}
    assert apart("x", one, 3 * one) == pytest.approx(expected)
    turned = apart("x", one, torch.stack([one[0], -one[1] * 9]))
    assert turned["spearman"] == pytest.approx(0)
    assert (turned["least"], turned["lowest"]) == pytest.approx((-1.0, 0.0))


def test_terms_of_several_seeds() -> None:
    one = {"what": "{share} mixed", "spearman": 0.5, "least": 0.1, "lowest": 0.2, "share": 0.312}
    other = {"what": "{share} mixed", "spearman": 0.7, "least": 0.0, "lowest": 0.4, "share": 0.418}
    term = over_seeds([[one], [other]])[0]
    expected = {"spearman": 0.6, "spearman_sd": 0.02**0.5, "least": 0.0, "lowest": 0.3, "lowest_sd": 0.02**0.5}
    assert {key: term[key] for key in expected} == pytest.approx(expected)
    assert term["seeds"] == {"spearman": [0.5, 0.7], "least": [0.1, 0.0], "lowest": [0.2, 0.4], "share": [0.312, 0.418]}
    assert said(term) == "0.31 to 0.42 mixed"
    assert said(over_seeds([[one]])[0]) == "0.31 mixed"
    assert (
        over_seeds([[{"what": "x", "relative_difference": d}] for d in (1e-7, 2e-7)])[0]["relative_difference"] == 2e-7
    )


@pytest.mark.parametrize("name", peer_definitions.PEERS)
def test_the_libraries_give_the_same_with_settings_alike(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    out = tmp_path / "out.json"
    given = [f"--{key}={value}" for key, value in SETTINGS.items()]
    result = CliRunner().invoke(peer_definitions.main, ["--out", str(out), "--threads", "1", *given])
    assert result.exit_code == 0, result.output
    terms = json.loads(out.read_text())["peers"][name]["terms"]
    same = [term for term in terms if "relative_difference" in term]
    assert len(same) > 5
    assert all(term["relative_difference"] < 1e-4 for term in same)
    assert all(term["least"] < 1 for term in terms if "least" in term)


def test_a_library_that_is_missing_keeps_what_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    terms = over_seeds(
        [
            [{"what": "gram", "relative_difference": 2e-7}, {"what": "loss", **apart}]
            for apart in (
                {"spearman": 0.9, "least": 0.5, "lowest": 0.7},
                {"spearman": 0.8, "least": 0.6, "lowest": 0.7},
            )
        ]
    )
    before = {"bergson": {"version": "1", "terms": terms}}
    out.write_text(json.dumps({"benchmark": "peer_definitions", "peers": before}))
    given = ["--out", str(out), "--threads", "1"]
    assert CliRunner().invoke(peer_definitions.main, given).exit_code == 0
    assert json.loads(out.read_text())["peers"] == before
    page.write_text("<!-- peer_definitions -->\n<!-- end of peer_definitions -->\n")
    assert CliRunner().invoke(peer_definitions.main, [*given, "--page", str(page)]).exit_code == 0
    assert "| gram | 2e-07 |" in page.read_text()
    assert "| loss | 0.850 (0.071) | 0.500 | 0.70 (0.00) |" in page.read_text()
