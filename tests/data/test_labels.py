"""Labels as classes, several classes and numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as hf

import influence_fast as inf
from influence_fast.data.labels import classes_of, is_hot, numbers_of, several_classes


def model(names: list[str] | None = None, count: int = 3) -> torch.nn.Module:
    module = torch.nn.Linear(1, 1)
    known = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}} if names else {}
    module.config = hf.BertConfig(**(known or {"num_labels": count}))
    return module


@pytest.mark.parametrize("value", [2, np.int64(2), torch.tensor(2), 2.0, "2", " 2 ", "2.0", "LABEL_2"])
def test_numbers_in_any_dress(value: object) -> None:
    assert classes_of("train", model(), None, None).number("label", value) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "has no label"),
        (math.nan, "has no label"),
        ("", "has no label"),
        (3, "has label 3, expected an int from 0 to 2"),
        (True, "has label True, expected an int"),
        (0.5, "has label 0.5, expected an int"),
        ("0.5", "has label '0.5', expected the number of a class, or its name"),
        ("good", "label 'good', the model knows LABEL_0, LABEL_1, LABEL_2; name its classes .*--label-names"),
    ],
)
def test_what_is_no_class_is_said(value: object, message: str) -> None:
    with pytest.raises(inf.InputError, match=message):
        classes_of("train", model(), None, None).number("label", value)


def test_names_of_the_config_of_the_user_and_of_the_data() -> None:
    own = classes_of("train", model(["NA", "null", "none"]), None, None)
    assert [own.number("label", name) for name in ("NA", "null", "none", "1")] == [0, 1, 2, 1]
    assert own.shown(1) == "null"
    given = classes_of("train", model(), ["a", "b", "c"], ["x", "y", "z"])
    assert given.number("label", "c") == 2
    assert classes_of("train", model(), None, ["x", "y", "z"]).number("label", "z") == 2
    assert classes_of("train", model(), None, ["x", "y"]).names is None
    # A number in text is a name where classes are called by numbers.
    stars = classes_of("train", model(["1", "2", "3"]), None, None)
    assert (stars.number("label", "1"), stars.number("label", 1)) == (0, 1)
    with pytest.raises(inf.InputError, match="label 'd', the model knows a, b, c"):
        given.number("label", "d")


def test_names_that_do_not_fit_are_refused() -> None:
    with pytest.raises(inf.InputError, match=r"label_names: the model has 3 classes, got 2 names \(a, b\)"):
        classes_of("train", model(), ["a", "b"], None)
    with pytest.raises(inf.InputError, match="train: its classes are numbered pos, neg, the model's NEG, POS"):
        classes_of("train", model(["NEG", "POS"]), None, ["pos", "neg"])


def test_numbers_for_regression() -> None:
    assert [numbers_of("score", value, 1) for value in (1, "2.5", np.float32(0.5))] == [1.0, 2.5, 0.5]
    assert numbers_of("score", [1, 2], 2) == [1.0, 2.0]
    for value, message in (
        (None, "has no score"),
        ("x", "expected a number"),
        ([1], "has 1 numbers in score, the model gives 2"),
    ):
        with pytest.raises(inf.InputError, match=message):
            numbers_of("score", value, 2)
    with pytest.raises(inf.InputError, match="finite"):
        numbers_of("score", "inf", 1)


def test_several_classes_of_a_row() -> None:
    classes = classes_of("train", model(["a", "b", "c"]), None, None)
    assert is_hot([[0, 1, 1], [0, 0, 0]], 3)
    assert not is_hot([[0, 1], [2]], 3)
    assert several_classes("labels", [0, 1, 1], classes, True) == [0.0, 1.0, 1.0]
    assert several_classes("labels", ["c", 0], classes, False) == [1.0, 0.0, 1.0]
    assert several_classes("labels", "a, c", classes, False) == [1.0, 0.0, 1.0]
    assert several_classes("labels", "", classes, False) == [0.0, 0.0, 0.0]
    with pytest.raises(inf.InputError, match="expected a list of classes"):
        several_classes("labels", None, classes, False)
