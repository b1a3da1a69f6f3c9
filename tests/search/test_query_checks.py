"""What a search is asked with: weights of layers, and rows by mask or by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import influence_fast as inf
from influence_fast.search.query_checks import layer_weights, row_mask


def test_layers_have_weights() -> None:
    assert layer_weights(["a", "b"], None) == {"a": 1.0, "b": 1.0}
    assert layer_weights(["a", "b", "c"], {"c": 2, "a": 0}) == {"c": 2.0}
    for wrong in ({"a": -1.0}, {"a": 0.0}, {"a": float("inf")}):
        with pytest.raises(inf.InputError, match="not negative"):
            layer_weights(["a"], wrong)


def test_rows_by_mask_number_and_name() -> None:
    def unasked() -> list[int | str]:
        raise AssertionError("a mask needs no names")

    expected = [True, False, True]
    for mask in (expected, torch.tensor(expected), np.array(expected)):
        assert row_mask(3, mask, unasked).tolist() == expected
    assert row_mask(3, ["z", "x"], lambda: ["x", "y", "z"]).tolist() == expected
    assert row_mask(3, torch.tensor([7, 5]), lambda: range(5, 8)).tolist() == expected
    with pytest.raises(inf.InputError, match=r"a mask of the 3 rows, got shape \(2,\)"):
        row_mask(3, [True, False], unasked)
    with pytest.raises(inf.InputError, match="no row has the id 8"):
        row_mask(3, [8], lambda: range(5, 8))
