"""The one list of methods, and methods of one's own in every place that takes a name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import models
import pytest
import torch
from click.testing import CliRunner
from stores import write_store

import influence_fast as inf
from influence_fast.cli import main


@pytest.fixture
def mine() -> Iterator[str]:
    def make(inputs: inf.MethodInputs) -> dict[str, torch.Tensor]:
        """Minus the dot product: a method whose right values are known."""
        matrix = inf.influence(inputs.train, inputs.queries, "dot")
        return {name: -matrix.layer(name) for name in matrix.layers}

    inf.register_method(inf.Method("minus-dot", "minus the inner product", make))
    yield "minus-dot"
    inf.unregister_method("minus-dot")


def test_a_method_of_ones_own_works_everywhere(mine: str, tmp_path) -> None:
    random = torch.Generator().manual_seed(0)
    train = write_store(
        tmp_path / "t", {"head": torch.randn(30, 4, generator=random)}, {"loss": torch.rand(30, generator=random)}
    )
    queries = {"head": torch.randn(3, 4, generator=random)}
    dot = inf.influence(train, queries, "dot")
    torch.testing.assert_close(inf.influence(train, queries, mine).layer("head"), -dot.layer("head"))
    found = inf.evaluate(train, queries, torch.arange(30) % 5 == 0, methods=["dot", mine], aggregations=["mean"])
    assert (mine, "all", "mean") in found.keys
    by_key = {key: row["auc_ndr"] for key, row in zip(found.keys, found.rows, strict=True)}
    assert by_key[inf.RankingKey(mine, "all", "mean")] != by_key[inf.RankingKey("dot", "all", "mean")]
    model, rows = models.make("bert"), models.rows(count=12)
    result = inf.audit(
        model, rows, rows[:4], methods=["dot", mine], aggregations=["mean"], layers="head", progress=False
    )
    torch.testing.assert_close(
        result.rankings[inf.RankingKey(mine, "all", "mean")], -result.rankings[inf.RankingKey("dot", "all", "mean")]
    )


def test_a_method_that_needs_classes_is_refused_for_a_causal_model() -> None:
    inf.register_method(inf.Method("by-class", "needs classes", lambda inputs: {}, needs={"model", "classes"}))
    try:
        model, rows = models.make("gpt2", "causal"), models.rows("causal", 8)
        with pytest.raises(inf.InputError, match=r"methods: by-class needs a classifier"):
            inf.audit(model, rows, rows[:3], methods=["by-class"], progress=False)
        gradients = {"head": torch.randn(3, 2)}
        with pytest.raises(inf.InputError, match=r"'by-class' needs a classifier.*from gradients alone: dot, cosine"):
            inf.influence(gradients, gradients, "by-class")
    finally:
        inf.unregister_method("by-class")


def test_names_are_checked() -> None:
    with pytest.raises(inf.InputError, match=r"there is a 'dot' already"):
        inf.register_method(inf.Method("dot", "again", lambda inputs: {}))
    with pytest.raises(inf.InputError, match=r"needs: expected some of model.*got 'luck'"):
        inf.Method("x", "y", lambda inputs: {}, needs={"luck"})
    with pytest.raises(inf.InputError, match=r"method: expected one of dot, .*pool, got 'nope'"):
        inf.influence({"a": torch.ones(2, 2)}, {"a": torch.ones(2, 2)}, "nope")


def test_the_command_line_offers_the_list() -> None:
    text = " ".join(CliRunner().invoke(main, ["audit", "--help"]).output.split())
    shown = text.replace("- ", "-")
    assert all(name in shown for name in inf.method_names())


def test_the_list_loads_no_torch() -> None:
    code = "import sys, influence_fast as inf; inf.method_names(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
