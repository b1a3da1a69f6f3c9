"""cleanlab's label quality and the neighbours' agreement, beside ours."""

from __future__ import annotations

import pytest
import torch

import influence_fast as inf
from influence_fast.evaluation.rivals import NEIGHBOURS, PROBE, has_cleanlab, label_quality, label_rivals, out_of_fold


def blobs(n: int = 120) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(n) % 3
    states = torch.eye(3)[classes] * 3 + torch.randn(n, 3, generator=random)
    noise = torch.rand(n, generator=random) < 0.2
    return states, torch.where(noise, (classes + 1) % 3, classes), noise


def inputs(states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return inf.neighbours({"a": states}, labels, 20)["a"][0], inf.probe_estimate(states, labels, states)[0]


@pytest.mark.skipif(not has_cleanlab(), reason="cleanlab is not installed")
def test_label_quality_is_the_probability_of_the_label() -> None:
    logits = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 3
    expected = logits.double().softmax(1)[torch.arange(20), labels]
    torch.testing.assert_close(label_quality(labels, logits.log_softmax(1)), expected)
    with pytest.raises(inf.InputError, match=r"expected \(19, classes\), got \(20, 3\)"):
        label_quality(labels[:19], logits)


def test_rivals_find_wrong_labels() -> None:
    states, labels, noise = blobs()
    found = label_rivals(labels, *inputs(states, labels))
    assert list(found) == ([PROBE] if has_cleanlab() else []) + [NEIGHBOURS]
    for name, scores in found.items():
        assert inf.roc_auc(scores, noise) > 0.9, name
    table = inf.compare({("ours", "all", "mean"): states[:, 0], **{(n, "", ""): s for n, s in found.items()}}, noise)
    assert table.winner.startswith(max(found, key=lambda name: inf.ndr_auc(found[name], noise)))
    assert "above the best influence ranking, ours all mean" in table.winner


def test_without_cleanlab_it_says_so(monkeypatch) -> None:
    monkeypatch.setattr("influence_fast.evaluation.rivals.has_cleanlab", lambda: False)
    states, labels, _ = blobs()
    assert list(label_rivals(labels, *inputs(states, labels))) == [NEIGHBOURS]
    with pytest.raises(inf.InputError, match="pip install cleanlab"):
        label_quality(labels, states)


def test_out_of_fold_predictions_stand_in_the_samples_order_and_never_saw_them() -> None:
    labels = torch.tensor([0, 1] * 10)

    def predict(learned: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        assert not set(learned.tolist()) & set(left.tolist())
        assert len(learned) + len(left) == 20
        return torch.stack([left, -left], 1)

    assert out_of_fold(predict, labels, 5)[:, 0].tolist() == list(range(20))
    with pytest.raises(inf.InputError, match="folds: expected 2 to 10"):
        out_of_fold(predict, labels, 11)
    with pytest.raises(inf.InputError, match=r"predict: expected \(4, 1\), got \(1, 1\)"):
        out_of_fold(lambda learned, left: torch.zeros(1, 1), labels, 5)
