"""Figures: vector drawings that take the page's colour of text, and tell their parts apart without colours."""

from __future__ import annotations

import re

import numpy as np
import torch
from audit_results import audit_result

import influence_fast as inf
from influence_fast.auditing.report.figures import heat, plots, reliability


def test_drawings_are_shapes_without_names_in_common() -> None:
    result = audit_result([""] * 30, [0, 1] * 15)
    result.noise = torch.arange(30) % 4 == 0
    # The best ranking is drawn beside the main one.
    result.rankings[inf.RankingKey("dot", "all", "mean")] = -result.noise.double()
    result.rankings[inf.RankingKey("cosine", "head", "mean")] = torch.rand(30).double()
    drawn = [svg for _, svg in plots(result, result.evaluate())]
    names = [name for svg in drawn for name in re.findall(r'id="([^"]+)"', svg)]
    assert len(drawn) == 3
    assert len(names) == len(set(names))
    assert not any("<image" in svg or "#010203" in svg for svg in drawn)
    assert all("currentColor" in svg for svg in drawn)
    # Each line is there twice, once in the legend; none has the colour and the dashes of another.
    lines = [
        style for style in re.findall(r'<path d="[^"]*"[^>]*style="([^"]*)"', drawn[0]) if "stroke-width: 2" in style
    ]
    kinds = [
        (re.findall("stroke: (#[0-9a-f]+)", style), re.findall("stroke-dasharray: ([^;]+)", style)) for style in lines
    ]
    assert len(kinds) == 10
    assert all(kinds.count(kind) == 2 for kind in kinds)


def test_numbers_are_read_on_every_cell() -> None:
    svg = heat(np.array([[0.0, 0.5, 1.0, np.nan]]), ["row"], ["a", "b", "c", "d"], 0.0, 1.0)
    inks = re.findall(r"fill: (#ffffff|#111111)[^>]*>(\d\.\d\d)<", svg)
    assert [(ink, value) for ink, value in inks] == [("#ffffff", "0.00"), ("#111111", "0.50"), ("#111111", "1.00")]


def test_reliability_is_drawn_where_it_was_measured() -> None:
    assert reliability(audit_result(["a", "b"], [0, 1])) is None
    assert (
        reliability(audit_result(["a", "b"], [0, 1], reliability=[{"predicted": 0, "observed": 0, "count": 0}])) is None
    )
    bins = [{"predicted": 0.2, "observed": 0.25, "count": 12}, {"predicted": 0.8, "observed": 0.7, "count": 34}]
    caption, svg = reliability(audit_result(["a", "b"], [0, 1], reliability=bins)) or ("", "")
    assert "number of labels" in caption
    assert re.search(r">\s*12\s*<", svg)
    assert re.search(r">\s*34\s*<", svg)
